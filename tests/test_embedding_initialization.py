"""Embeddings from the text: tokens that are used alike start alike, the rest of the model stays as it was."""

import numpy as np
import pytest
import torch
from conftest import VOCAB_SIZE, Rows
from transformers import BertConfig, BertForMaskedLM, set_seed

from hf_cram import CrammedBertForMaskedLM
from hf_cram.embedding_initialization import cooccurrence_embeddings, initialize_embeddings_from_text

ANIMALS, COLOURS = range(10, 20), range(30, 40)


def animals_and_colours(count=2000, length=16, seed=0):
    """Rows in which one of ten animals always follows token 5 and one of ten colours token 6."""
    rng = np.random.default_rng(seed)
    is_animal = rng.random((count, length // 2)) < 0.5
    words = np.where(is_animal, rng.integers(10, 20, is_animal.shape), rng.integers(30, 40, is_animal.shape))
    return np.stack((np.where(is_animal, 5, 6), words), axis=-1).reshape(count, length)


def test_tokens_of_one_kind_are_near_each_other():
    table = cooccurrence_embeddings(animals_and_colours(), vocab_size=50, hidden_size=8, window=1)
    assert table[table.any(1)].square().mean() == pytest.approx(1.0)
    directions = torch.nn.functional.normalize(table, dim=1)
    nearest = (directions @ directions.T).fill_diagonal_(-2).topk(3).indices
    for kind in (ANIMALS, COLOURS):
        for token in kind:
            assert set(nearest[token].tolist()) <= set(kind)
    assert not table[40:].any()  # never seen


def test_tokens_that_do_not_occur_change_nothing_for_others():
    sizes = [cooccurrence_embeddings(animals_and_colours(), size, hidden_size=8, window=1) for size in (50, 500)]
    means = [table[table.any(1)].square().mean().item() for table in sizes]
    assert means == pytest.approx([1.0, 1.0])


def test_left_and_right_neighbours_are_told_apart():
    # 7 only stands before 8, 9 only behind it: the same neighbour, on other sides.
    rows = np.tile([7, 8, 9, 20, 21, 22, 23, 24, 25, 26], (50, 3))
    directions = torch.nn.functional.normalize(cooccurrence_embeddings(rows, 30, 8, window=1), dim=1)
    assert directions[7] @ directions[9] < 0.5


def test_a_text_with_few_tokens_fills_the_columns_that_it_can():
    table = cooccurrence_embeddings(np.array([[1, 2, 3, 1]]), vocab_size=4, hidden_size=64)
    assert table.isfinite().all()
    assert table[1:].any(1).all()
    assert not table[0].any()


@pytest.mark.parametrize("build", [
    CrammedBertForMaskedLM,
    lambda config: BertForMaskedLM(BertConfig(vocab_size=VOCAB_SIZE, hidden_size=32, num_hidden_layers=1,
                                              num_attention_heads=2, intermediate_size=32)),
])  # fmt: skip
def test_only_the_embeddings_of_tokens_that_occur_change(tiny_config, build):
    set_seed(0)
    model = build(tiny_config)
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    state = torch.get_rng_state()
    initialize_embeddings_from_text(model, Rows(200))
    assert torch.equal(torch.get_rng_state(), state)
    embeddings = model.get_input_embeddings().weight
    assert model.get_output_embeddings().weight is embeddings
    for name, tensor in model.named_parameters():
        if tensor is not embeddings:
            assert torch.equal(tensor, before[name]), name
        else:
            assert torch.equal(tensor[:5], before[name][:5])  # special tokens are not in the rows
            assert not torch.isclose(tensor[5:], before[name][5:]).all(1).any()
            assert tensor[5:].std().item() == pytest.approx(0.1, rel=0.2)


def test_the_same_rows_give_the_same_embeddings(tiny_config):
    tables = []
    for seed in (1, 2):
        set_seed(seed)
        model = CrammedBertForMaskedLM(tiny_config)
        initialize_embeddings_from_text(model, Rows(200))
        tables.append(model.get_input_embeddings().weight[5:])
    assert torch.equal(*tables)


def test_rows_that_cannot_be_counted_are_refused(tiny_config):
    model = CrammedBertForMaskedLM(tiny_config)
    for rows in ([{"input_ids": [5, 6]}, {"input_ids": [5, 6, 7]}], [{"pixels": [1.0]}]):
        with pytest.raises(ValueError, match="rows of token ids of one length"):
            initialize_embeddings_from_text(model, rows)
