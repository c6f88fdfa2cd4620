"""Masking: fixed counts, reproducible draws, the asked shares."""

import numpy as np
import pytest
import torch

from hf_cram.data.collator import DataCollatorForFixedCountMasking, parse_phases


def make_rows(count, length=128, seed=0, low=5, high=105):
    tokens = np.random.default_rng(seed).integers(low, high, (count, length)).astype(np.uint16)
    return [{"input_ids": row, "mask_key": np.uint64(index)} for index, row in enumerate(tokens)]


@pytest.mark.parametrize(("rate", "count"), [(0.15, 19), (0.25, 32), (0.4, 51), (0.001, 1)])
def test_every_row_has_the_same_count_and_never_none(tokenizer, rate, count):
    batch = DataCollatorForFixedCountMasking(tokenizer, rate)(make_rows(50))
    assert (batch["labels"] != -100).sum(1).tolist() == [count] * 50
    assert batch["masked_positions"].shape == (50, count)
    rows = torch.arange(50).unsqueeze(1)
    assert (batch["labels"][rows, batch["masked_positions"]] != -100).all()


def test_shares_of_shown_tokens(tokenizer):
    rows = make_rows(400)
    for mask, random in ((0.8, 0.1), (0.5, 0.5), (1.0, 0.0), (0.0, 0.0)):
        batch = DataCollatorForFixedCountMasking(tokenizer, 0.25, mask, random)(rows)
        predicted = batch["labels"] != -100
        shown, original = batch["input_ids"][predicted], batch["labels"][predicted]
        is_mask = shown == tokenizer.mask_token_id
        changed = (shown != original) & ~is_mask
        assert is_mask.float().mean().item() == pytest.approx(mask, abs=0.02)
        assert changed.float().mean().item() == pytest.approx(random * 0.99, abs=0.02)  # 1 in 100 draws the original
        originals = torch.tensor(np.stack([row["input_ids"] for row in rows]).astype(np.int64))
        assert torch.equal(batch["input_ids"][~predicted], originals[~predicted])
        assert torch.equal(original, originals[predicted])
        assert not np.isin(shown[changed], tokenizer.all_special_ids).any()


def test_every_position_is_as_likely(tokenizer):
    batch = DataCollatorForFixedCountMasking(tokenizer, 0.25)(make_rows(2000))
    share = (batch["labels"] != -100).float().mean(0)
    assert share.min() > 0.2
    assert share.max() < 0.3


def test_special_tokens_are_never_predicted(tokenizer):
    rows = make_rows(20)
    for row in rows:
        row["input_ids"][:100] = tokenizer.sep_token_id
    batch = DataCollatorForFixedCountMasking(tokenizer, 0.15)(rows)
    assert (batch["labels"][:, :100] == -100).all()
    assert ((batch["labels"] != -100).sum(1) == 19).all()
    for row in rows:  # fewer ordinary tokens than the count: the shape stays, the surplus has no label
        row["input_ids"][:120] = tokenizer.sep_token_id
    batch = DataCollatorForFixedCountMasking(tokenizer, 0.15)(rows)
    assert batch["masked_positions"].shape == (20, 19)
    assert ((batch["labels"] != -100).sum(1) == 8).all()
    assert (batch["input_ids"][:, :120] == tokenizer.sep_token_id).all()


def test_masks_depend_on_seed_key_and_nothing_else(tokenizer):
    rows = make_rows(8)
    collator = DataCollatorForFixedCountMasking(tokenizer, 0.25, seed=1)
    together = collator(rows)["input_ids"]
    torch.manual_seed(123)
    alone = torch.cat([collator([row])["input_ids"] for row in rows])
    assert torch.equal(together, alone)
    other_seed = DataCollatorForFixedCountMasking(tokenizer, 0.25, seed=2)(rows)["input_ids"]
    assert not torch.equal(together, other_seed)
    next_pass = [{**row, "mask_key": row["mask_key"] + np.uint64(1 << 40)} for row in rows]
    assert not torch.equal(together, collator(next_pass)["input_ids"])
    without_keys = [{"input_ids": row["input_ids"]} for row in rows]
    assert torch.equal(collator(without_keys)["input_ids"], collator(without_keys)["input_ids"])


def test_phases_follow_the_budget(tokenizer):
    collator = DataCollatorForFixedCountMasking(tokenizer, "0:0.3,0.5:0.2,0.8:0.15")
    rates = [collator.follow_budget(fraction)["mlm_probability"] for fraction in (0, 0.49, 0.5, 0.79, 0.8, 1.0)]
    assert rates == pytest.approx([0.3, 0.3, 0.2, 0.2, 0.15, 0.15])
    assert collator(make_rows(2))["masked_positions"].shape == (2, 19)


def test_loader_workers_follow_the_phases(tokenizer):
    collator = DataCollatorForFixedCountMasking(tokenizer, "0:0.5,0.5:0.25")
    loader = torch.utils.data.DataLoader(
        make_rows(64), batch_size=1, collate_fn=collator, num_workers=1, prefetch_factor=1
    )
    counts = []
    for number, batch in enumerate(loader):
        counts.append(batch["masked_positions"].shape[1])
        if number == 5:
            collator.follow_budget(0.6)
    assert counts[0] == 64
    assert counts[-1] == 32


@pytest.mark.parametrize("text", ["0.5:0.3", "0:0.3,0.2:1.5", "0:0.3,0.3:0.2,0.2:0.1", "often", "0:0.3;0.5:0.2", "0"])
def test_wrong_phases_are_refused(text):
    with pytest.raises(ValueError, match="mask rate"):
        parse_phases(text)


def test_a_system_without_shared_memory_masks_all_the_same(tokenizer, monkeypatch):
    def refuse(_):
        raise RuntimeError("unable to open shared memory object")

    monkeypatch.setattr(torch.Tensor, "share_memory_", refuse)
    assert DataCollatorForFixedCountMasking(tokenizer, "0:0.5")([{"input_ids": [7, 8, 9, 10]}])["labels"].shape == (
        1,
        4,
    )


def test_wrong_input_is_refused(tokenizer):
    with pytest.raises(ValueError, match="together at most 1"):
        DataCollatorForFixedCountMasking(tokenizer, 0.15, 0.8, 0.3)
    padded = [
        {"input_ids": [7, 8, 0], "attention_mask": [1, 1, 0]},
        {"input_ids": [7, 8, 9], "attention_mask": [1, 1, 1]},
    ]
    with pytest.raises(ValueError, match="rows must not be padded: pack them first"):
        DataCollatorForFixedCountMasking(tokenizer)(padded)
    whole = [{name: torch.tensor(values) for name, values in padded[1].items()}]
    assert DataCollatorForFixedCountMasking(tokenizer)(whole)["input_ids"].shape == (1, 3)
    with pytest.raises(ValueError, match="one length"):
        DataCollatorForFixedCountMasking(tokenizer)([{"input_ids": [7, 8]}, {"input_ids": [7, 8, 9]}])
