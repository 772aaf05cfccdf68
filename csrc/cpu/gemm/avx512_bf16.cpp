// Routes with AVX-512 BF16 and VBMI: products of bfloat16 activations and an NF4 or bfloat16 weight, low-rank update
// included.
//
// vdpbf16ps adds two products of bfloat16 to each of 16 fp32 sums; it reads denormals as zero, so that vcvtneps2bf16,
// which writes zero for them, loses nothing on the way to it.
#include "gemm/panels_avx512_bf16.h"
#include "gemm/ragged_dots_avx512_bf16.h"
#include "gemm/register_dots_avx512_bf16.h"
#include "gemm/wide_dots_avx512_bf16.h"

namespace lora_ops {

const GemmRoute kBf16RegisterDots = {serves_register_dots, plan_register_dots, prepare_register_dots,
                                     register_dots_task, true};
const GemmRoute kBf16RaggedDots = {serves_ragged_dots, plan_ragged_dots, nullptr, ragged_dots_task, true};
const GemmRoute kBf16WideDots = {serves_wide_dots, plan_wide_dots, prepare_wide_dots, wide_dots_task, true};
const GemmRoute kBf16Panels = {serves_panels, panel_plan<Bf16Engine>, nullptr, panels_task, true};

}  // namespace lora_ops
