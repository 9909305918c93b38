"""Sphinx's configuration: ``python -m sphinx -W --keep-going -b html docs docs/_build/html``.

Neither the build nor the pages need a network: formulas are MathML, which browsers draw themselves.
"""

import re

from docutils.nodes import SkipNode
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.util import logging

import fastbn

project = "fastbn"
author = "the fastbn developers"
copyright = author
version = release = fastbn.__version__

extensions = ["myst_parser", "numpydoc", "sphinx.ext.autodoc", "sphinx.ext.autosummary"]
exclude_patterns = ["_build"]
nitpicky = True
nitpick_ignore_regex = [
    # In single backquotes, docstrings also name parameters and builtins.
    (
        "py:obj",
        r"x|y|dy|out|mask|bias|input|residual|residual_out|use_input_stats|unbiased|num_groups|self"
        r"|correction|strict|sum|repr|model|fuse|Moments\.__init__",
    ),
]

myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 4

default_role = "py:obj"
# torch is not installed where the pages are built: of its modules, nothing but docstrings is read.
autodoc_mock_imports = [
    "torch",
    *(f"fastbn.torch.{name}" for name in ("arrays", "composed", "compute", "eager", "fusion")),
    *(f"fastbn.torch.{name}" for name in ("operators", "tracing")),
]
autodoc_typehints = "none"
autodoc_member_order = "bysource"
numpydoc_show_class_members = False
# A docstring is there, and names the parameters of the signature, in its order.
numpydoc_validation_checks = {"GL08", "PR02", "PR03"}

html_theme = "furo"
html_title = f"fastbn {version}"
html_static_path = ["_static"]
html_css_files = ["formulas.css"]
html_show_sourcelink = False
html_copy_source = False
html_math_renderer = "mathml"


def write_formula(as_block):
    """A visitor of Sphinx's HTML writer."""

    def visit(writer, node):
        try:
            writer.body.append(tex2mathml(node.astext(), as_block=as_block))
        except MathError as error:
            logging.getLogger(__name__).warning("%s", error, location=node)
        raise SkipNode

    return visit


def offer_outside_pages(app, docname, source):
    """Let a link to Markdown outside of this folder lead to the file, as links to sources do."""
    source[0] = re.sub(r"\]\((\.\./[^)#]+\.md)\)", r"](path:\1)", source[0])


def setup(app):
    app.connect("source-read", offer_outside_pages)
    app.add_html_math_renderer("mathml", (write_formula(False), None), (write_formula(True), None))
