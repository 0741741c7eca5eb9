"""Texts that grow are encoded as if they were read whole."""

import pytest
import torch
from transformers import Cache, GPT2Config, GPT2Model

from qm_lightning.backbones import HFBackbone
from qm_lightning.backbones.incremental import IncrementalEncoder
from qm_lightning.backbones.small import save_backbone, small_llama
from qm_lightning.errors import UserError
from qm_lightning.tokens import Tokens

LENGTHS = torch.tensor([7, 3, 5])


def gpt2() -> GPT2Model:
    return GPT2Model(GPT2Config(vocab_size=257, n_positions=24, n_embd=16, n_layer=3, n_head=2))


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def backbone(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> HFBackbone:
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    model = small_llama(width=16, depth=3, heads=2, max_tokens=24) if request.param == "llama" else gpt2()
    save_backbone(model, folder, None)
    return HFBackbone(str(folder), layers=[0, 2], special_tokens="protect", dtype="float64")


def grown(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Texts after ``step`` appended tokens; padding holds 0."""
    text = torch.randint(0, 257, (3, 24), generator=torch.Generator().manual_seed(1))
    mask = torch.arange(int(LENGTHS.max()) + step) < (LENGTHS + step)[:, None]
    return text[:, : mask.shape[1]].masked_fill(~mask, 0), mask


def assert_same(got: Tokens, want: Tokens) -> None:
    assert got.attention is not None
    assert want.attention is not None
    assert torch.equal(got.mask, want.mask)
    real = want.mask
    for name in ("values", "positions", "metric", "protected", "ids"):
        torch.testing.assert_close(getattr(got, name)[real], getattr(want, name)[real], rtol=0, atol=1e-10)
    for name in ("entropy", "norm"):
        pair = (getattr(part.attention, name)[:, real] for part in (got, want))
        torch.testing.assert_close(*pair, rtol=0, atol=1e-10)


def test_growing_is_reading_whole(backbone: HFBackbone) -> None:
    encoder = IncrementalEncoder(backbone)
    for step in range(6):
        ids, mask = grown(step)
        assert_same(encoder(ids, mask), backbone({"input_ids": ids, "attention_mask": mask.long()}))


def test_only_the_new_token_is_read(backbone: HFBackbone, monkeypatch: pytest.MonkeyPatch) -> None:
    widths: list[int] = []
    read = backbone.read

    def watched(inputs: dict[str, torch.Tensor], cache: Cache) -> Tokens:
        widths.append(inputs["input_ids"].shape[1])
        return read(inputs, cache)

    monkeypatch.setattr(backbone, "read", watched)
    encoder = IncrementalEncoder(backbone)
    for step in (0, 1, 2, 2, 5):  # the same texts again, and a leap: read whole
        ids, mask = grown(step)
        assert_same(encoder(ids, mask), backbone({"input_ids": ids, "attention_mask": mask.long()}))
    ids = ids.clone()
    ids[:, 0] += 1  # other texts, which happen to be one token longer
    ids = torch.nn.functional.pad(ids, (0, 1))
    longer = torch.arange(13) < (LENGTHS + 6)[:, None]
    assert_same(encoder(ids, longer), backbone({"input_ids": ids, "attention_mask": longer.long()}))
    assert widths == [7, 1, 1, 9, 12, 13]


def test_positions_run_out(backbone: HFBackbone) -> None:
    encoder = IncrementalEncoder(backbone)
    ids = torch.zeros(1, 24, dtype=torch.long)
    encoder(ids, ids == 0)
    ids = torch.zeros(1, 25, dtype=torch.long)
    with pytest.raises(UserError, match="25 tokens long; expected at most 24"):
        encoder(ids, ids == 0)
