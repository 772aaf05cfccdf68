/* The C ABI of lora_ops: raw pointers and sizes, no torch and no Python headers.
 *
 * One binary serves every torch and Python version. Functions are thread-safe, keep no reference to their
 * arguments, and return a lora_ops_status. Outputs are undefined unless the status is LORA_OPS_OK. */
#ifndef LORA_OPS_H
#define LORA_OPS_H

#include <stdint.h>

#if defined(_WIN32)
#define LORA_OPS_API __declspec(dllexport)
#else
#define LORA_OPS_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* Raised with every change that an older caller would not survive; lora_ops/runtime/native.py holds the same number. */
#define LORA_OPS_ABI_VERSION 5

typedef enum {
    LORA_OPS_OK = 0,
    LORA_OPS_BAD_ARGUMENT = 1,
    LORA_OPS_NONFINITE = 2,       /* an input holds inf or NaN */
    LORA_OPS_UNSUPPORTED_ISA = 3, /* this machine, or this build, lacks the instruction set */
    LORA_OPS_NO_MEMORY = 4,
    LORA_OPS_IO = 5, /* a file could not be read or written, or holds something else */
} lora_ops_status;

typedef enum {
    LORA_OPS_F32 = 0,
    LORA_OPS_F16 = 1,
    LORA_OPS_BF16 = 2,
} lora_ops_dtype;

typedef enum {
    LORA_OPS_ISA_AUTO = -1, /* the best that the machine has */
    LORA_OPS_ISA_PORTABLE = 0,
    LORA_OPS_ISA_AVX2 = 1,        /* AVX2, FMA, F16C */
    LORA_OPS_ISA_AVX512 = 2,      /* AVX-512 F, BW, DQ, VL */
    LORA_OPS_ISA_AVX512_BF16 = 3, /* and BF16, VBMI */
    LORA_OPS_ISA_NEON = 4,        /* what every 64-bit ARM processor has */
    LORA_OPS_ISA_NEON_BF16 = 5,   /* and BF16 */
} lora_ops_isa;

/* An NF4 tensor, flat in row-major order: element 2i in the high nibble of byte i, element 2i + 1 in the low one.
 * The scale of block i is absmax[i]; or, when absmax is NULL (double quantization), in fp32 and rounded twice,
 * absmax_map[absmax_codes[i]] * nested_absmax[i / 256] + nested_offset. */
typedef struct {
    const uint8_t* packed;
    const float* absmax;
    const uint8_t* absmax_codes;
    const float* absmax_map; /* 256 values, ascending */
    const float* nested_absmax;
    float nested_offset;
    int64_t block_size; /* a multiple of 32 */
} lora_ops_nf4_weight;

/* A frozen weight W [n, k]: NF4, or, where dense is not NULL, dense in the activations' dtype. Dense points to W, or if
 * transposed to its transpose [k, n]; its rows are stride elements apart. */
typedef struct {
    const void* dense;
    int64_t stride;
    int transposed;
    lora_ops_nf4_weight nf4;
} lora_ops_weight;

/* The low-rank part of a linear layer. Element (m, k) of its input is kept if Philox 4x32-10 with key seed and counter
 * (k / 8, m, offset, 0) gives it a 16-bit lane of at least threshold (0: no dropout), and then scaled so that the mean
 * stays; see kernels/philox/reference.py. */
typedef struct {
    const void* lora_a; /* A [r, k], contiguous */
    const void* lora_b; /* B [n, r], contiguous */
    int lora_a_dtype, lora_b_dtype;
    int64_t n, k, r;
    float scale;
    uint32_t threshold; /* <= 65536 */
    uint64_t seed;
    uint32_t offset;
} lora_ops_adapter;

/* A run of elements of a parameter with its AdamW states: fp32, or, where the absmax pointers are not NULL, 8-bit codes
 * in blocks of 256. `row` chooses the constants; `stream`, `step` and `first` (the parameter's number, its step, and the
 * element that the run begins at, a multiple of 256) choose the bits of stochastic rounding. Nothing overlaps. */
typedef struct {
    void* param;
    const void* grad;
    void* exp_avg;
    void* exp_avg_sq;
    float* exp_avg_absmax;
    float* exp_avg_sq_absmax;
    int64_t n, param_dtype, grad_dtype;
    int64_t row, stream, step, first;
} lora_ops_adamw_slice;

/* An extent of AdamW's states: in a frame, in the file, or in neither, which means zeros. */
typedef struct {
    int64_t frame;      /* the one that holds it, or -1 */
    int64_t dirty;      /* the frame holds what the file does not */
    int64_t stored;     /* the file holds it, with this checksum */
    uint64_t checksum;
    int64_t begin, end; /* its slices in a step */
} lora_ops_page;

typedef struct {
    int64_t fd;
    int64_t extent_bytes; /* a multiple of 4096 */
    char* const* frames;  /* of extent_bytes each */
    int64_t n_frames;
    lora_ops_page* pages; /* by extent: extent i is at byte i * extent_bytes of the file */
    int64_t n_pages;
    const int64_t* order; /* extents of a step, those that are in frames first */
    int64_t n_order;
    const int64_t* spare; /* frames that hold no extent of the step, those to be used first last */
    int64_t n_spare;
} lora_ops_page_table;

typedef enum {
    LORA_OPS_IO_READ = 1,
    LORA_OPS_IO_WRITE = 2,
    LORA_OPS_IO_TRUNCATED = 3, /* the file ends at `byte` */
    LORA_OPS_IO_CHECKSUM = 4,
} lora_ops_io_failure;

/* What a step moved between frames and the file, the nanoseconds that threads took for it, and what failed first. */
typedef struct {
    int64_t bytes_read, bytes_written, read_ns, write_ns;
    int64_t failure, failed_extent, failed_byte, failed_errno;
} lora_ops_page_report;

LORA_OPS_API int lora_ops_abi_version(void);

/* The instruction set in use, and whether one can be used here. Forcing holds for the whole process. */
LORA_OPS_API int lora_ops_get_isa(void);
LORA_OPS_API int lora_ops_supports_isa(int isa);
LORA_OPS_API int lora_ops_force_isa(int isa);

/* The 16 values of NF4, ascending. */
LORA_OPS_API const float* lora_ops_nf4_code(void);

/* w [n] -> packed [(n + 1) / 2], absmax [ceil(n / block_size)]. An odd n is padded with the code of zero. */
LORA_OPS_API int lora_ops_nf4_quantize(const void* w, int dtype, int64_t n, int64_t block_size, uint8_t* packed,
                                       float* absmax, int n_threads);

/* The same of W [n, k] that lies transposed in memory: w [k, n]. Scratch: at most 72 k + 4 block_size bytes a thread,
 * kept until the thread ends. */
LORA_OPS_API int lora_ops_nf4_quantize_transposed(const void* w, int dtype, int64_t n, int64_t k, int64_t block_size,
                                                  uint8_t* packed, float* absmax, int n_threads);

/* Elements [begin, end) -> out [end - begin]: code * scale in fp32, rounded to nearest even. begin may be odd. */
LORA_OPS_API int lora_ops_nf4_dequantize(const lora_ops_nf4_weight* w, int64_t begin, int64_t end, void* out,
                                         int dtype, int n_threads);

/* W [n, k] -> out [k, n]: the same values, transposed. */
LORA_OPS_API int lora_ops_nf4_dequantize_transposed(const lora_ops_nf4_weight* w, int64_t n, int64_t k, void* out,
                                                    int dtype, int n_threads);

/* Whether the functions that take a weight multiply a dense one of this dtype faster than torch does here: 1 or 0. */
LORA_OPS_API int lora_ops_takes_dense(int dtype);

/* y [m, n] = x [m, k] Wᵀ + bias, with W [n, k] rounded to dtype, sums in fp32 and one rounding at the end. x, y and
 * bias [n] (or NULL) are of dtype; rows of x are stride_x elements apart, rows of y stride_y. Scratch: less than 2 MiB
 * a thread and, for up to 64 rows, once what x takes (at most in fp32), kept until the thread ends. */
LORA_OPS_API int lora_ops_linear(const lora_ops_weight* weight, int64_t n, int64_t k, const void* x, int64_t m,
                                 int64_t stride_x, const void* bias, void* y, int64_t stride_y, int dtype,
                                 int n_threads);

/* dx [m, k] = dy [m, n] W, likewise. */
LORA_OPS_API int lora_ops_linear_dx(const lora_ops_weight* weight, int64_t n, int64_t k, const void* dy, int64_t m,
                                    int64_t stride_dy, void* dx, int64_t stride_dx, int dtype, int n_threads);

/* x [n] -> codes [n], absmax [ceil(n / block_size)]: the nearest of map's 256 ascending values, ties to the lower. */
LORA_OPS_API int lora_ops_blockwise8_quantize(const float* x, int64_t n, int64_t block_size, const float* map,
                                              uint8_t* codes, float* absmax, int n_threads);

/* codes [n] -> out [n]: map[code] * absmax in fp32. */
LORA_OPS_API int lora_ops_blockwise8_dequantize(const uint8_t* codes, const float* absmax, int64_t n,
                                                int64_t block_size, const float* map, float* out, int n_threads);

/* s [m, r] = drop(x) Aᵀ in fp32, and y [m, n] = x Wᵀ + bias + scale s Bᵀ; without a weight y holds x Wᵀ + bias already. x,
 * y and bias (or NULL) are of dtype, rows of x and y stride_x and stride_y elements apart. A, B and scale s may be rounded
 * to dtype as operands; sums are fp32, and with a bfloat16 product of W they are rounded once. Scratch is kept until the
 * thread ends. */
LORA_OPS_API int lora_ops_lora_forward(const lora_ops_adapter* adapter, const lora_ops_weight* weight,
                                       const void* bias, const void* x, int64_t m, int64_t stride_x, float* s, void* y,
                                       int64_t stride_y, int dtype, int n_threads);

/* With ds = scale dy B: dx [m, k] = dy W + drop(ds A), or without a weight dx += drop(ds A); dlora_a [r, k] = dsᵀ drop(x)
 * and dlora_b [n, r] = scale dyᵀ s of A's and B's dtypes, dbias [n] = sum of dy's rows. A null output is not computed; x
 * serves dlora_a only, s dlora_b only. */
LORA_OPS_API int lora_ops_lora_backward(const lora_ops_adapter* adapter, const lora_ops_weight* weight, const void* dy,
                                        int64_t m, int64_t stride_dy, const void* x, int64_t stride_x, const float* s,
                                        void* dx, int64_t stride_dx, void* dlora_a, void* dlora_b, void* dbias,
                                        int dtype, int n_threads);

/* Rows [first_row, first_row + rows) of the mask: bit j of byte i of a row's ceil(k / 8) belongs to column 8 i + j. */
LORA_OPS_API int lora_ops_dropout_mask(uint64_t seed, uint32_t offset, uint32_t threshold, int64_t first_row,
                                       int64_t rows, int64_t k, uint8_t* bits);

/* One AdamW step of many slices. constants [rows, 8]: 1 - lr weight_decay, 1 - beta1, beta2, 1 - beta2, eps,
 * lr / (1 - beta1^step), 1 / sqrt(1 - beta2^step), sign of the gradient. The maps are those of the codes of exp_avg and of
 * exp_avg_sq. With a seed, bf16 parameters are rounded stochastically. */
LORA_OPS_API int lora_ops_adamw(const lora_ops_adamw_slice* slices, int64_t count, const float* constants, int64_t rows,
                                const float* signed_map, const float* unsigned_map, const uint64_t* seed,
                                int n_threads);

/* `lora_ops_adamw` of slices in extents: addresses of states are offsets in their extent. Each thread takes one extent
 * after the other; where an extent is not in a frame, a frame that is done with is written back if it is dirty and read
 * into. Pages then tell where everything is. With LORA_OPS_IO the step is incomplete, and a frame that was being read into
 * is no extent's; the report is written with LORA_OPS_OK too. */
LORA_OPS_API int lora_ops_adamw_pages(const lora_ops_page_table* table, const lora_ops_adamw_slice* slices, int64_t count,
                                      const float* constants, int64_t rows, const float* signed_map,
                                      const float* unsigned_map, const uint64_t* seed, int n_threads,
                                      lora_ops_page_report* report);

/* The checksum of n bytes; lora_ops/paging/checksum.py defines it. */
LORA_OPS_API int lora_ops_checksum(const void* bytes, int64_t n, uint64_t* checksum);

#ifdef __cplusplus
}
#endif

#endif
