"""The benchmark: fastbn, its peers and the floor that memory sets, each in a process of its own.

`python -m bench` in the repository's root measures. `runner` starts a `worker` process for each of
the `libraries` and asks them in turn; `cases` says what is measured and what is right. The results
are JSON; `report` makes tables of it, held against `goals`, and `picture` draws it.
"""
