# The declarations of kernels.h and platform.h, which tell what each of these is.


cdef extern from "kernels.h" nogil:
    enum:
        LANES "FASTBN_LANES"
        TREE "FASTBN_TREE"
        GROUP "FASTBN_GROUP"
        COLUMNS "FASTBN_COLUMNS"
        ADDITIONS "FASTBN_ADDITIONS"
        MASK_BYTES "FASTBN_MASK_BYTES"
        BITS_PADDING "FASTBN_BITS_PADDING"
        STREAM_BYTES "FASTBN_STREAM_BYTES"
        INTERLEAVED "FASTBN_INTERLEAVED"

    ctypedef struct Affine "fastbn_affine":
        double centre[COLUMNS]
        double scale[COLUMNS]
        double shift[COLUMNS]

    ctypedef struct Gradient "fastbn_gradient":
        double dy_mean[COLUMNS]
        double x_mean[COLUMNS]
        double slope[COLUMNS]
        double scale[COLUMNS]

    enum:
        LINEAR "FASTBN_LINEAR"
        RELU "FASTBN_RELU"
        LEAKY_RELU "FASTBN_LEAKY_RELU"
        LEAKY_RELU_INVERTED "FASTBN_LEAKY_RELU_INVERTED"

    ctypedef struct Activation "fastbn_activation":
        int kind
        double slope, cap

    bint is_clamped "fastbn_is_clamped"(int kind, double slope)

    ctypedef struct Epilogue "fastbn_epilogue":
        Activation activation
        const void *residual
        unsigned char *alive
        Py_ssize_t first

    ctypedef struct Gate "fastbn_gate":
        Activation activation
        const double *low
        const double *high
        const unsigned char *alive
        Py_ssize_t first
        void *passed

    ctypedef struct Ahead "fastbn_ahead":
        Py_ssize_t near, border, jump

    ctypedef struct Runs "fastbn_runs":
        Py_ssize_t samples, stride, channels, len
        Ahead ahead
        Ahead residual_ahead
        const unsigned char *mask
        Py_ssize_t mask_stride

    ctypedef struct Matrix "fastbn_matrix":
        Py_ssize_t rows, len, stride, channels, run
        const unsigned char *mask
        Py_ssize_t mask_stride

    ctypedef struct Results "fastbn_results":
        const void *dy
        const void *x
        void *to
        Py_ssize_t stride
        const Affine *affine
        const Activation *activation
        const Gradient *gradient
        const Gate *gate

    ctypedef void SumMoments "fastbn_moments"(const void *x, const Runs *runs, const double *pivot,
                                              double *first, double *second) noexcept nogil
    ctypedef void SumProducts "fastbn_products"(const void *dy, const void *x, const Runs *runs,
                                                const double *mean, const Gate *gate,
                                                double *first, double *second) noexcept nogil
    ctypedef void SumColumnMoments "fastbn_column_moments"(const void *x, const Matrix *matrix,
                                                           const double *pivot, double *first,
                                                           double *second) noexcept nogil
    ctypedef void SumColumnProducts "fastbn_column_products"(const void *dy, const void *x,
                                                             const Matrix *matrix,
                                                             const double *mean,
                                                             const Gate *gate, double *first,
                                                             double *second) noexcept nogil

    ctypedef struct Kernels "fastbn_kernels":
        bint writes_passed
        void (*load_as_double)(const void *x, Py_ssize_t stride, Py_ssize_t count,
                               double *to) noexcept nogil
        void (*store_from_double)(const double *from_, Py_ssize_t stride, Py_ssize_t count,
                                  void *to) noexcept nogil
        SumMoments *moments
        SumProducts *products
        SumColumnMoments *column_moments
        SumColumnProducts *column_products
        SumMoments *tree_moments
        SumProducts *tree_products
        SumColumnProducts *column_tree_products
        SumMoments *raw_moments
        SumColumnMoments *column_raw_moments
        void (*pivots)(const void *x, const Py_ssize_t *at, Py_ssize_t count, Py_ssize_t stride,
                       Py_ssize_t channels, double *pivot) noexcept nogil
        void (*moments_beside_results)(const void *x, const Runs *runs, const double *pivot,
                                       double *first, double *second,
                                       const Results *results) noexcept nogil
        void (*products_beside_results)(const void *dy, const void *x, const Runs *runs,
                                        const double *mean, const Gate *gate, double *first,
                                        double *second, const Results *results) noexcept nogil
        void (*normalize)(const void *x, void *y, const Runs *runs, const Affine *affine,
                          const Epilogue *epilogue, int nontemporal) noexcept nogil
        void (*gradient)(const void *dy, const void *x, void *dx, const Runs *runs,
                         const Gradient *gradient, const Gate *gate,
                         int nontemporal) noexcept nogil
        void (*column_normalize)(const void *x, void *y, const Matrix *matrix,
                                 const Affine *affine, const Epilogue *epilogue,
                                 int nontemporal) noexcept nogil
        void (*column_gradient)(const void *dy, const void *x, void *dx, const Matrix *matrix,
                                const Gradient *gradient, const Gate *gate,
                                int nontemporal) noexcept nogil
        void (*gate_bounds)(const Affine *affine, const Activation *activation, Py_ssize_t count,
                            double *low, double *high) noexcept nogil
        void (*activation_gradient)(const void *dy, const void *y, const unsigned char *alive,
                                    Py_ssize_t first, Py_ssize_t count,
                                    const Activation *activation, void *to) noexcept nogil

    ctypedef struct Recovery "fastbn_recovery":
        double least, greatest, reach, ratio

    ctypedef struct CommonKernels "fastbn_common_kernels":
        Py_ssize_t (*count_valid)(const unsigned char *mask, Py_ssize_t len) noexcept nogil
        void (*invstd)(const double *m2, double n, double eps, Py_ssize_t count,
                       double *invstd) noexcept nogil
        void (*mean_and_m2)(const double *pivot, const double *first, const double *second,
                            double n, Py_ssize_t count, double *mean, double *m2) noexcept nogil
        bint (*float32_mean_and_m2)(const double *pivot, const double *first,
                                    const double *second, double n, Py_ssize_t count,
                                    double *mean, double *m2) noexcept nogil
        bint (*raw_mean_and_m2)(const double *first, const double *second, double n,
                                Py_ssize_t count, double *mean, double *m2) noexcept nogil
        bint (*float32_products)(const double *mean, const double *first, double n,
                                 Py_ssize_t count, double *second) noexcept nogil
        void (*move_towards)(const double *target, double divisor, double factor,
                             Py_ssize_t count, double *moved) noexcept nogil
        void (*multiply)(const double *by, Py_ssize_t count, double *multiplied) noexcept nogil
        void (*gradient_coefficients)(const double *invstd, double n, Py_ssize_t count,
                                      double *dy_mean, double *slope, double *scale) noexcept nogil
        bint (*any_huge)(const double *mean, Py_ssize_t count) noexcept nogil
        bint (*all_recoverable)(const double *weight, const double *bias, double slope,
                                const Recovery *recovery, Py_ssize_t count) noexcept nogil
        void (*fence_nontemporal)() noexcept nogil

    ctypedef struct Isa "fastbn_isa":
        const char *name
        const CommonKernels *common
        const Kernels *float32
        const Kernels *float64
        const Kernels *float16
        const Kernels *bfloat16


cdef extern from "platform.h" nogil:
    int fastbn_supported_isas(const Isa **isas, int capacity)
    Py_ssize_t fastbn_cache_bytes(int level)
    int fastbn_omp_max_threads()
    bint fastbn_omp_pause()
    bint fastbn_borrow_threads(const char *library)
    ctypedef void fastbn_work(void *data, int share) noexcept nogil
    bint fastbn_on_borrowed_threads(fastbn_work *work, void *data, int shares)
    double fastbn_seconds()
    ctypedef struct fastbn_range:
        pass
    void fastbn_set_range(fastbn_range *range, Py_ssize_t first, Py_ssize_t end)
    Py_ssize_t fastbn_take_first(fastbn_range *range, Py_ssize_t reserved)
    Py_ssize_t fastbn_take_last(fastbn_range *range, Py_ssize_t reserved)
    const char *fastbn_compiler()
    const char *fastbn_openmp()
