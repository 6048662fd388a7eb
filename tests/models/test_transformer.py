import torch

from models.transformer import positions


def test_places_are_told_apart_in_bf16_as_in_fp32() -> None:
    exact, rounded = (positions(0, torch.zeros(1, 400, 64, dtype=dtype)) for dtype in (torch.float32, torch.bfloat16))
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.float(), exact, rtol=0, atol=2**-8)
    assert len(rounded.unique(dim=0)) == 400
