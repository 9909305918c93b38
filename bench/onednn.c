/* oneDNN's batch normalization (API version 3), by itself or with a ReLU or an addition and a ReLU,
   bound once to its buffers and then executed again and again without a caller's overhead in
   between. */

#include <oneapi/dnnl/dnnl.h>
#include <stddef.h>
#include <stdlib.h>

enum { EVAL, TRAIN, BACKWARD };
enum {
    ARGUMENTS = 13,
    VECTORS = 6,   /* the first argument that is a vector of one value per channel */
    WORKSPACE = 12 /* what a training forward with a ReLU leaves for its backward */
};

/* In the order in which the buffers are given. */
static const int argument[ARGUMENTS] = {
    DNNL_ARG_SRC,        DNNL_ARG_DST,        DNNL_ARG_DIFF_SRC,  DNNL_ARG_DIFF_DST, DNNL_ARG_SRC_1,
    DNNL_ARG_DIFF_SRC_1, DNNL_ARG_MEAN,       DNNL_ARG_VARIANCE,  DNNL_ARG_SCALE,    DNNL_ARG_SHIFT,
    DNNL_ARG_DIFF_SCALE, DNNL_ARG_DIFF_SHIFT, DNNL_ARG_WORKSPACE,
};

/* What follows: nothing, a ReLU, an addition and a ReLU. */
static const unsigned fusions[] = {0, dnnl_fuse_norm_relu, dnnl_fuse_norm_add_relu};

static const dnnl_data_type_t dtypes[] = {dnnl_f32, dnnl_bf16, dnnl_f16};
static const dnnl_format_tag_t layouts[] = {dnnl_nchw, dnnl_nhwc, dnnl_nChw16c, dnnl_nChw8c};

typedef struct {
    dnnl_primitive_t primitive;
    dnnl_exec_arg_t arguments[ARGUMENTS];
    int count;
} norm;

static dnnl_engine_t engine;
static dnnl_stream_t stream;

static int start(void)
{
    if (stream)
        return 0;
    return dnnl_engine_create(&engine, dnnl_cpu, 0) ||
           dnnl_stream_create(&stream, engine, dnnl_stream_default_flags);
}

static dnnl_memory_desc_t describe(const int64_t *dims, int dtype, int layout)
{
    dnnl_memory_desc_t desc = NULL;
    dnnl_memory_desc_create_with_tag(&desc, 4, dims, dtypes[dtype], layouts[layout]);
    return desc;
}

/* The size of an array; blocks of channels are padded. */
size_t array_bytes(const int64_t *dims, int dtype, int layout)
{
    dnnl_memory_desc_t desc = describe(dims, dtype, layout);
    size_t bytes = dnnl_memory_desc_get_size(desc);
    dnnl_memory_desc_destroy(desc);
    return bytes;
}

/* Copy an array from one layout to another. Returns 0 if it went well. */
int reorder(const int64_t *dims, int dtype, int from_layout, void *from, int to_layout, void *to)
{
    dnnl_memory_desc_t descs[2] = {describe(dims, dtype, from_layout),
                                   describe(dims, dtype, to_layout)};
    dnnl_primitive_desc_t pd = NULL;
    dnnl_primitive_t primitive = NULL;
    dnnl_memory_t memories[2] = {NULL, NULL};
    int status =
        start() ||
        dnnl_reorder_primitive_desc_create(&pd, descs[0], engine, descs[1], engine, NULL) ||
        dnnl_primitive_create(&primitive, pd) ||
        dnnl_memory_create(&memories[0], descs[0], engine, from) ||
        dnnl_memory_create(&memories[1], descs[1], engine, to);
    if (!status) {
        dnnl_exec_arg_t arguments[2] = {{DNNL_ARG_FROM, memories[0]}, {DNNL_ARG_TO, memories[1]}};
        status =
            dnnl_primitive_execute(primitive, stream, 2, arguments) || dnnl_stream_wait(stream);
    }
    for (int i = 0; i < 2; i++) {
        dnnl_memory_destroy(memories[i]);
        dnnl_memory_desc_destroy(descs[i]);
    }
    dnnl_primitive_destroy(primitive);
    dnnl_primitive_desc_destroy(pd);
    return status;
}

/* NULL if oneDNN cannot. */
static dnnl_primitive_desc_t describe_primitive(int kind, int fusion, dnnl_memory_desc_t data,
                                                float eps)
{
    unsigned flags = dnnl_use_scale | dnnl_use_shift | fusions[fusion] |
                     (kind == EVAL ? dnnl_use_global_stats : 0);
    dnnl_primitive_desc_t forward = NULL, backward = NULL;
    int status = start() || dnnl_batch_normalization_forward_primitive_desc_create(
                                &forward, engine,
                                kind == EVAL ? dnnl_forward_inference : dnnl_forward_training, data,
                                data, eps, flags, NULL);
    if (status || kind != BACKWARD)
        return forward;
    dnnl_batch_normalization_backward_primitive_desc_create(&backward, engine, dnnl_backward, data,
                                                            data, data, eps, flags, forward, NULL);
    dnnl_primitive_desc_destroy(forward);
    return backward;
}

static const_dnnl_memory_desc_t workspace_of(const_dnnl_primitive_desc_t pd)
{
    return dnnl_primitive_desc_query_md(pd, dnnl_query_workspace_md, 0);
}

/* The size of what a training forward leaves for its backward: 0 where it leaves nothing. */
size_t workspace_bytes(int fusion, const int64_t *dims, int dtype, int layout, float eps)
{
    dnnl_memory_desc_t data = describe(dims, dtype, layout);
    dnnl_primitive_desc_t pd = describe_primitive(TRAIN, fusion, data, eps);
    const_dnnl_memory_desc_t workspace = pd ? workspace_of(pd) : NULL;
    size_t bytes = workspace ? dnnl_memory_desc_get_size(workspace) : 0;
    dnnl_primitive_desc_destroy(pd);
    dnnl_memory_desc_destroy(data);
    return bytes;
}

static int bind(norm *self, const_dnnl_memory_desc_t data, const_dnnl_memory_desc_t workspace,
                int64_t channels, void *const *buffers)
{
    dnnl_memory_desc_t vector = NULL;
    int status = dnnl_memory_desc_create_with_tag(&vector, 1, &channels, dnnl_f32, dnnl_a);
    for (int i = 0; i < ARGUMENTS && !status; i++) {
        if (!buffers[i])
            continue;
        dnnl_exec_arg_t *slot = &self->arguments[self->count++];
        slot->arg = argument[i];
        const_dnnl_memory_desc_t desc = i < VECTORS ? data : i == WORKSPACE ? workspace : vector;
        status = dnnl_memory_create(&slot->memory, desc, engine, buffers[i]);
    }
    dnnl_memory_desc_destroy(vector);
    return status;
}

void norm_destroy(norm *self)
{
    for (int i = 0; i < self->count; i++)
        dnnl_memory_destroy(self->arguments[i].memory);
    dnnl_primitive_destroy(self->primitive);
    free(self);
}

/* A batch normalization on these buffers, NULL where there is none to give; NULL if oneDNN cannot.
 */
norm *norm_create(int kind, int fusion, const int64_t *dims, int dtype, int layout, float eps,
                  void *const *buffers)
{
    norm *self = calloc(1, sizeof *self);
    dnnl_memory_desc_t data = describe(dims, dtype, layout);
    dnnl_primitive_desc_t pd = describe_primitive(kind, fusion, data, eps);
    int status = !self || !pd || dnnl_primitive_create(&self->primitive, pd) ||
                 bind(self, data, workspace_of(pd), dims[1], buffers);
    dnnl_primitive_desc_destroy(pd);
    dnnl_memory_desc_destroy(data);
    if (status && self) {
        norm_destroy(self);
        self = NULL;
    }
    return self;
}

/* Which of oneDNN's implementations it is. */
const char *norm_implementation(const norm *self)
{
    const_dnnl_primitive_desc_t pd = NULL;
    const char *name = NULL;
    dnnl_primitive_get_primitive_desc(self->primitive, &pd);
    dnnl_primitive_desc_query(pd, dnnl_query_impl_info_str, 0, &name);
    return name;
}

/* Returns 0 if it went well. */
int norm_execute(const norm *self, long repeats)
{
    int status = 0;
    for (long r = 0; r < repeats && !status; r++)
        status = dnnl_primitive_execute(self->primitive, stream, self->count, self->arguments) ||
                 dnnl_stream_wait(stream);
    return status;
}
