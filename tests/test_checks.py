"Checks of input: one clear sentence for every kind of mistake."

import re

import pytest
import torch

from dml_nb.core.checks import check_at_least, check_embeddings, check_labels, check_sample_ids

E, Y = torch.zeros(3, 4), torch.tensor([0, 1, 1])


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: check_embeddings(E.tolist()), "embeddings must be a tensor, got list"),
        (lambda: check_embeddings(E[0]), "embeddings must have shape (B, D), got (4,)"),
        (lambda: check_embeddings(E.long()), "embeddings must be floating point, got torch.int64"),
        (lambda: check_embeddings(E, 8), "create the loss with embedding_size=4"),
        (lambda: check_embeddings(E.half().index_fill(0, torch.tensor([1]), torch.inf)), "infinity, first in row 1"),
        (lambda: check_labels(Y.tolist(), 3), "labels must be a tensor, got list"),
        (lambda: check_labels(Y[:2], 3), "labels must have shape (3,) to match the embeddings, got (2,)"),
        (lambda: check_labels(Y.float(), 3), "labels must be integers, got torch.float32"),
        (lambda: check_labels(Y > 0, 3), "labels must be integers, got torch.bool"),
        (lambda: check_labels(Y.to_sparse(), 3), "labels must be a dense tensor, got the layout torch.sparse_coo"),
        (lambda: check_labels(Y.to("meta"), 3), "labels must not be on the device 'meta'"),
        (lambda: check_labels(Y - 1, 3, 2), "label -1 is outside 0...1: number the classes from 0"),
        (lambda: check_labels(Y, 3, 1), "label 1 is outside 0...0"),
        (lambda: check_sample_ids(Y - 1, 3), "sample_ids must be 0 or above, got -1"),
        (lambda: check_sample_ids(Y[:2], 3), "sample_ids must be a tensor of 3 whole numbers, one per embedding"),
        (lambda: check_sample_ids(Y.float(), 3), "got (3,) torch.float32"),
        (lambda: check_sample_ids(Y.tolist(), 3), "got list"),
        (lambda: check_at_least(K=("a", 1)), "K must be a number, got 'a'"),
        (lambda: check_at_least(K=(True, 0)), "K must be a number, got True"),
    ],
)
def test_message(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


def test_no_limit_for_empty_input():
    check_embeddings(torch.zeros(0, 4), 4)
    check_labels(torch.zeros(0, dtype=torch.long), 0, 5)
    check_sample_ids(torch.zeros(0, dtype=torch.long), 0)
