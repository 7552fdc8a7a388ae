"Values and gradients agree with pytorch-metric-learning wherever both packages have the loss."

import math
import warnings

import pytest
import torch

from dml_nb.core.golden import fixture
from dml_nb.losses import create_loss
from dml_nb.losses.base import to_masks
from dml_nb.losses.miners import create_miner

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pml = pytest.importorskip("pytorch_metric_learning", reason="pytorch-metric-learning is not installed")
    from pytorch_metric_learning import distances, losses, miners, reducers, regularizers

C, D = 5, 8
SIZES = dict(num_classes=C, embedding_size=D)


def squared_euclidean():
    return distances.LpDistance(power=2)


def with_miner(loss, miner):
    "Their loss on the pairs that their miner selects."
    return lambda x, y: loss(x, y, miner(x, y))


EASY = dict(allowed_pos_range=(0, 0.9999), allowed_neg_range=(0, 1))

# name of our loss, optionally with a comment: (our parameters, their loss, tolerance if not 1e-10)
PAIRS = {
    "contrastive": (
        dict(variant="pml", margin=0.5, pos_margin=0.1),
        lambda: losses.ContrastiveLoss(pos_margin=0.1, neg_margin=0.5),
    ),
    "multi_similarity": (dict(mining_eps=None), lambda: losses.MultiSimilarityLoss(alpha=2, beta=50, base=0.5)),
    "multi_similarity, mined": (
        dict(),
        lambda: with_miner(losses.MultiSimilarityLoss(), miners.MultiSimilarityMiner(0.1)),
    ),
    "circle": (dict(), lambda: losses.CircleLoss(m=0.4, gamma=80), 1e-9),
    "circle, faces": (dict(preset="face"), lambda: losses.CircleLoss(m=0.25, gamma=256), 1e-9),
    "triplet, squared": (
        dict(rule="all", reduction="active"),
        lambda: losses.TripletMarginLoss(0.2, distance=squared_euclidean()),
    ),
    "triplet": (dict(rule="all", squared=False, reduction="active"), lambda: losses.TripletMarginLoss(0.2)),
    "triplet, plain mean": (
        dict(rule="all"),
        lambda: losses.TripletMarginLoss(0.2, distance=squared_euclidean(), reducer=reducers.MeanReducer()),
    ),
    "triplet, semi-hard": (
        dict(preset="proxy_anchor_repo"),
        lambda: with_miner(losses.TripletMarginLoss(0.1), miners.TripletMarginMiner(0.1, "semihard")),
    ),
    "triplet, hardest": (
        dict(miner="hard", reduction="active"),
        lambda: with_miner(losses.TripletMarginLoss(0.2, distance=squared_euclidean()), miners.BatchHardMiner()),
    ),
    "margin": (dict(rule="all"), losses.MarginLoss, 1e-6),
    "npair": (dict(preset="pml"), losses.NPairsLoss),
    "npair, raw": (
        dict(preset="proxy_anchor_repo"),
        lambda: losses.NPairsLoss(distance=distances.DotProductSimilarity(normalize_embeddings=False)),
    ),
    "tuplet_margin": (dict(), lambda: losses.TupletMarginLoss(5.73, 64)),
    "intra_pair_variance": (dict(), losses.IntraPairVarianceLoss),
    "nca": (dict(), lambda: losses.NCALoss(1)),
    "ranked_list": (dict(preset="pml"), lambda: losses.RankedListLoss(margin=0.4, Tn=10)),
    "lifted_structure": (dict(normalize=True), losses.LiftedStructureLoss),
    "lifted_structure, raw": (
        dict(),
        lambda: losses.LiftedStructureLoss(distance=distances.LpDistance(normalize_embeddings=False)),
    ),
    "easy_positive, hard": (
        dict(preset="ephn"),
        lambda: with_miner(
            losses.NTXentLoss(temperature=0.1),
            miners.BatchEasyHardMiner("easy", "hard", distance=distances.CosineSimilarity(), **EASY),
        ),
    ),
    "easy_positive": (
        dict(),
        lambda: with_miner(
            losses.NTXentLoss(temperature=0.1),
            miners.BatchEasyHardMiner("easy", "semihard", distance=distances.CosineSimilarity(), **EASY),
        ),
    ),
}

PROXIES = {
    "norm_softmax": (dict(), lambda: losses.NormalizedSoftmaxLoss(C, D)),
    "cosface": (dict(), lambda: losses.CosFaceLoss(C, D)),
    "arcface": (dict(), lambda: losses.ArcFaceLoss(C, D)),
    "arcface, revisiting": (
        dict(preset="revisiting"),
        lambda: losses.ArcFaceLoss(C, D, margin=math.degrees(0.5), scale=16),
    ),
    "softtriple": (dict(proxies_per_class=3, tau=0.0), lambda: losses.SoftTripleLoss(C, D, centers_per_class=3)),
    "softtriple, regularised": (
        dict(proxies_per_class=3),
        lambda: losses.SoftTripleLoss(
            C,
            D,
            centers_per_class=3,
            weight_regularizer=regularizers.SparseCentersRegularizer(C, 3),
            weight_reg_weight=0.2,
        ),
        1e-5,
    ),
    "proxy_nca": (dict(smoothing=0.0), lambda: losses.ProxyNCALoss(C, D, softmax_scale=9)),
    "proxy_nca, scale 32": (dict(preset="proxy_anchor_repo"), lambda: losses.ProxyNCALoss(C, D, softmax_scale=32)),
    "proxy_nca_pp": (dict(), lambda: losses.ProxyNCALoss(C, D, softmax_scale=9)),
    "proxy_anchor": (dict(), lambda: losses.ProxyAnchorLoss(C, D)),
}


def batches():
    fix = fixture()
    yield fix.embeddings, fix.labels
    generator = torch.Generator().manual_seed(0)
    yield torch.randn(40, D, generator=generator, dtype=torch.float64), torch.arange(40) % C


def assert_agreement(ours, theirs, x, y, tolerance=1e-10):
    "Same value, and same gradient by the embeddings."
    x = x.clone().requires_grad_()
    values = [loss(x, y) for loss in (ours, theirs)]
    grads = [torch.autograd.grad(value, x)[0] for value in values]
    assert values[0].item() == pytest.approx(values[1].item(), rel=tolerance)
    torch.testing.assert_close(*grads, rtol=tolerance, atol=max(tolerance / 10, 1e-12))


@pytest.fixture(autouse=True)
def float64():
    "Their losses create constants in the default dtype."
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("case", PAIRS)
def test_pair_losses_agree(case):
    ours, theirs, *tolerance = PAIRS[case]
    for x, y in batches():
        assert_agreement(create_loss(case.partition(",")[0], **ours), theirs(), x, y, *tolerance)


@pytest.mark.parametrize("case", PROXIES)
def test_proxy_losses_agree(case):
    torch.manual_seed(0)
    ours, theirs, *tolerance = PROXIES[case]
    for x, y in batches():
        our_loss = create_loss(case.partition(",")[0], **SIZES, **ours).double()
        their_loss = theirs().double()
        (their_proxies,) = their_loss.parameters()
        table = our_loss.proxies.detach().flatten(0, -2)
        transposed = their_proxies.shape != table.shape
        their_proxies.data = table.T.clone() if transposed else table.clone()
        assert_agreement(our_loss, their_loss, x, y, *tolerance)
        our_grad = torch.autograd.grad(our_loss(x, y), our_loss.proxies)[0].flatten(0, -2)
        their_grad = torch.autograd.grad(their_loss(x, y), their_proxies)[0]
        rtol = max(1e-5, 10 * (tolerance or [0])[0])
        torch.testing.assert_close(our_grad, their_grad.T if transposed else their_grad, rtol=rtol, atol=1e-8)


def test_histogram_agrees():
    for x, y in batches():
        assert_agreement(create_loss("histogram"), losses.HistogramLoss(100), x, y, 1e-9)


def test_angular_agrees_on_unit_vectors():
    # their loss does not normalise the negatives, so only the part of the gradient across the vectors can agree
    for x, y in batches():
        z = torch.nn.functional.normalize(x).requires_grad_()
        values = [loss(z, y) for loss in (create_loss("angular", preset="pml"), losses.AngularLoss(40))]
        assert values[0].item() == pytest.approx(values[1].item(), rel=1e-10)
        grads = [torch.autograd.grad(value, z)[0] for value in values]
        across = [g - (g * z).sum(1, keepdim=True) * z for g in grads]
        torch.testing.assert_close(*across, rtol=1e-9, atol=1e-12)


def test_index_tuples_work_in_both_directions():
    for x, y in batches():
        their_pairs = miners.MultiSimilarityMiner(0.1)(x, y)
        our_value = create_loss("contrastive", variant="pml")(x, y, indices_tuple=their_pairs)
        their_value = losses.ContrastiveLoss()(x, y, their_pairs)
        assert our_value.item() == pytest.approx(their_value.item(), rel=1e-10)

        our_pairs = create_miner("multi_similarity")(x, y)
        our_value, their_value = create_loss("multi_similarity")(x, y), losses.MultiSimilarityLoss()(x, y, our_pairs)
        assert their_value.item() == pytest.approx(our_value.item(), rel=1e-10)

        our_triplets = create_miner("hard")(x, y)
        our_value = create_loss("triplet", squared=False, reduction="active")(x, y, indices_tuple=our_triplets)
        their_value = losses.TripletMarginLoss(0.2)(x, y, our_triplets)
        assert their_value.item() == pytest.approx(our_value.item(), rel=1e-10)


@pytest.mark.parametrize(
    "ours, theirs",
    [
        (("multi_similarity", {}), lambda: miners.MultiSimilarityMiner(0.1)),
        (("hard", {}), lambda: miners.BatchHardMiner()),
        (("easy_positive", dict(negative="hard")), lambda: miners.BatchEasyHardMiner("easy", "hard")),
        (("easy_positive", {}), lambda: miners.BatchEasyHardMiner("easy", "semihard")),
    ],
)
def test_miners_select_the_same_pairs(ours, theirs):
    for x, y in batches():
        our_masks, their_masks = (
            torch.stack(to_masks(miner(x, y), (len(x), len(x))))
            for miner in (create_miner(ours[0], **ours[1]), theirs())
        )
        assert our_masks.equal(their_masks)


def test_manifold_agrees():
    # their loss inverts the matrix in float32
    for x, y in batches():
        ours = create_loss("manifold_proxy", **SIZES, num_proxies=C).double()
        theirs = losses.ManifoldLoss(l=D, K=C).double()
        ours.meta[:] = torch.arange(C)
        ours.meta_proxies.data = theirs.proxies.detach().clone()
        assert ours(x, y).item() == pytest.approx(theirs(x, indices_tuple=y).item(), rel=1e-5)


THEIR_MINERS = {
    "pairs": lambda: miners.MultiSimilarityMiner(0.1),
    "triplets": lambda: miners.TripletMarginMiner(0.1, "semihard"),
    "hard": lambda: miners.BatchHardMiner(),
}


@pytest.mark.parametrize("miner", THEIR_MINERS)
@pytest.mark.parametrize("name", ["contrastive", "triplet", "multi_similarity", "margin", "circle", "cbml"])
def test_our_losses_take_their_miners(name, miner):
    "As if the user had called the miner, also with references and inside a sum."
    rule = dict(rule="all") if name in ("triplet", "margin") else {}  # their own rule draws at random
    mine, plain = THEIR_MINERS[miner](), create_loss(name, **rule)
    loss = create_loss(name, miner=mine, **rule)
    for x, y in batches():
        x = x.clone().requires_grad_()
        assert_agreement(loss, lambda x, y: plain(x, y, indices_tuple=mine(x, y)), x, y)
        references = dict(ref_emb=x.detach().flip(0) + 0.1, ref_labels=y.flip(0))
        expected = plain(x, y, indices_tuple=mine(x, y, *references.values()), **references)
        assert loss(x, y, **references).item() == pytest.approx(expected.item(), rel=1e-10)
    both = create_loss({name: 1.0, "proxy_anchor": 0.0}, **SIZES, **{name: dict(miner=mine, **rule)})
    assert both(x, y).item() == pytest.approx(loss(x, y).item(), rel=1e-6)


def test_their_miner_cannot_mine_a_memory_and_says_so():
    with pytest.raises(ValueError, match="MultiSimilarityMiner cannot mine a memory: choose a miner from list_miners"):
        create_loss("xbm", **SIZES, pair_params=dict(miner=miners.MultiSimilarityMiner()))
    sim = torch.eye(4)
    with pytest.raises(ValueError, match="MultiSimilarityMiner needs embeddings"):
        create_loss("contrastive", miner=miners.MultiSimilarityMiner()).from_similarities(sim, sim > 0, sim <= 0)


def test_their_memory_takes_our_losses_and_our_miners():
    for x, y in batches():
        for miner in ("multi_similarity", "hard"):
            ours = losses.CrossBatchMemory(create_loss("contrastive", variant="pml"), D, 50, create_miner(miner))
            theirs = losses.CrossBatchMemory(losses.ContrastiveLoss(), D, 50, create_miner(miner))
            for _ in range(3):
                values = ours(x, y), theirs(x, y)
                assert values[0].item() == pytest.approx(values[1].item(), rel=1e-9)
