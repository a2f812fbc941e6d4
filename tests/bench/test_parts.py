"""A step's time by class of kernel."""

import pytest

from bench import parts


def test_kernels_are_told_apart_by_name_and_products_by_time() -> None:
    events = [
        parts.Event(name, start, seconds)
        for name, start, seconds in [
            ("nvjet_tst_256x128_64x4_bz_coopA_NTN", 0.0, 0.5),
            ("nvjet_tst_64x8_64x16_bz_TNT", 0.5, 0.01),
            ("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128>>", 0.51, 0.1),
            ("triton_red_fused__to_copy_mul_0", 0.61, 0.1),
            (
                "void at::native::vectorized_elementwise_kernel<4, at::native::bfloat16_copy_kernel_cuda>",
                0.6,
                0.2,
            ),
            ("void at::native::vectorized_elementwise_kernel<4, at::native::BinaryFunctor>", 0.9, 0.05),
            ("void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>", 1.0, 0.02),
            ("sparse_kernel", 1.02, 0.03),
        ]
    ]
    found = parts.Profile(events, least_weights=100, num_forwards=2).parts(50, 1.2, 50_000)
    found.pop("kernels")
    assert found == pytest.approx(
        {
            "long_products": 0.5,
            "short_products": 0.01,
            "attention": 0.1,
            "fused": 0.1,
            "copies": 0.2,
            "elementwise": 0.05,
            "optimizer": 0.02,
            "loss": 0.03,
            "idle": 0.3,
        }
    )
