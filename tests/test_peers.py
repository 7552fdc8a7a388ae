"pytorch-metric-learning, as an independent oracle, gives the same values and gradients wherever both have the loss."

import math
import warnings

import pytest
import torch

from dml_nb.core.golden import fixture
from dml_nb.losses import create_loss
from dml_nb.losses.miners import create_miner
from dml_nb.losses.pair_base import to_masks

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pml = pytest.importorskip("pytorch_metric_learning", reason="pytorch-metric-learning is not installed")
    from pytorch_metric_learning import distances, losses, miners, reducers, regularizers

C, D = 5, 8
SIZES = dict(num_classes=C, embedding_size=D)


def squared():
    return distances.LpDistance(power=2)


def mined(loss, miner):
    return lambda x, y: loss(x, y, miner(x, y))


EASY = dict(allowed_pos_range=(0, 0.9999), allowed_neg_range=(0, 1))

# what is compared: our parameters, their loss, the tolerance where theirs has an epsilon of its own
PAIRS = {
    "contrastive": (
        [dict(variant="pml", margin=0.5, pos_margin=0.1)],
        lambda: losses.ContrastiveLoss(pos_margin=0.1, neg_margin=0.5),
    ),
    "multi_similarity": ([dict(mining_eps=None)], lambda: losses.MultiSimilarityLoss(alpha=2, beta=50, base=0.5)),
    "multi_similarity, mined": (
        [dict()],
        lambda: mined(losses.MultiSimilarityLoss(), miners.MultiSimilarityMiner(0.1)),
    ),
    "circle": ([dict()], lambda: losses.CircleLoss(m=0.4, gamma=80), 1e-9),
    "circle, faces": ([dict(preset="face")], lambda: losses.CircleLoss(m=0.25, gamma=256), 1e-9),
    "triplet, squared": (
        [dict(rule="all", reduction="active")],
        lambda: losses.TripletMarginLoss(0.2, distance=squared()),
    ),
    "triplet": ([dict(rule="all", squared=False, reduction="active")], lambda: losses.TripletMarginLoss(0.2)),
    "triplet, plain mean": (
        [dict(rule="all")],
        lambda: losses.TripletMarginLoss(0.2, distance=squared(), reducer=reducers.MeanReducer()),
    ),
    "triplet, semi-hard": (
        [dict(preset="proxy_anchor_repo")],
        lambda: mined(losses.TripletMarginLoss(0.1), miners.TripletMarginMiner(0.1, "semihard")),
    ),
    "triplet, hardest": (
        [dict(miner="hard", reduction="active")],
        lambda: mined(losses.TripletMarginLoss(0.2, distance=squared()), miners.BatchHardMiner()),
    ),
    "margin": ([dict(rule="all")], losses.MarginLoss, 1e-6),
    "npair": ([dict(preset="pml")], losses.NPairsLoss),
    "npair, raw": (
        [dict(preset="proxy_anchor_repo")],
        lambda: losses.NPairsLoss(distance=distances.DotProductSimilarity(normalize_embeddings=False)),
    ),
    "tuplet_margin": ([dict()], lambda: losses.TupletMarginLoss(5.73, 64)),
    "intra_pair_variance": ([dict()], losses.IntraPairVarianceLoss),
    "nca": ([dict()], lambda: losses.NCALoss(1)),
    "ranked_list": ([dict(preset="pml")], lambda: losses.RankedListLoss(margin=0.4, Tn=10)),
    "lifted_structure": ([dict(normalize=True)], losses.LiftedStructureLoss),
    "lifted_structure, raw": (
        [dict()],
        lambda: losses.LiftedStructureLoss(distance=distances.LpDistance(normalize_embeddings=False)),
    ),
    "easy_positive, hard": (
        [dict(preset="ephn")],
        lambda: mined(
            losses.NTXentLoss(temperature=0.1),
            miners.BatchEasyHardMiner("easy", "hard", distance=distances.CosineSimilarity(), **EASY),
        ),
    ),
    "easy_positive": (
        [dict()],
        lambda: mined(
            losses.NTXentLoss(temperature=0.1),
            miners.BatchEasyHardMiner("easy", "semihard", distance=distances.CosineSimilarity(), **EASY),
        ),
    ),
}

PROXIES = {
    "norm_softmax": ([dict()], lambda: losses.NormalizedSoftmaxLoss(C, D)),
    "cosface": ([dict()], lambda: losses.CosFaceLoss(C, D)),
    "arcface": ([dict()], lambda: losses.ArcFaceLoss(C, D)),
    "arcface, revisiting": (
        [dict(preset="revisiting")],
        lambda: losses.ArcFaceLoss(C, D, margin=math.degrees(0.5), scale=16),
    ),
    "softtriple": ([dict(proxies_per_class=3, tau=0.0)], lambda: losses.SoftTripleLoss(C, D, centers_per_class=3)),
    "softtriple, regularised": (
        [dict(proxies_per_class=3)],
        lambda: losses.SoftTripleLoss(
            C,
            D,
            centers_per_class=3,
            weight_regularizer=regularizers.SparseCentersRegularizer(C, 3),
            weight_reg_weight=0.2,
        ),
        1e-5,
    ),
    "proxy_nca": ([dict(smoothing=0.0)], lambda: losses.ProxyNCALoss(C, D, softmax_scale=9)),
    "proxy_nca, scale 32": ([dict(preset="proxy_anchor_repo")], lambda: losses.ProxyNCALoss(C, D, softmax_scale=32)),
    "proxy_nca_pp": ([dict()], lambda: losses.ProxyNCALoss(C, D, softmax_scale=9)),
    "proxy_anchor": ([dict()], lambda: losses.ProxyAnchorLoss(C, D)),
}


def batches():
    fix = fixture()
    yield fix.embeddings, fix.labels
    generator = torch.Generator().manual_seed(0)
    yield torch.randn(40, D, generator=generator, dtype=torch.float64), torch.arange(40) % C


def agree(ours, theirs, x, y, tolerance, parts=()):
    x = x.clone().requires_grad_()
    values = [loss(x, y) for loss in (ours, theirs)]
    grads = [torch.autograd.grad(value, (x, *part))[0] for value, part in zip(values, parts or [(), ()])]
    assert values[0].item() == pytest.approx(values[1].item(), rel=tolerance)
    torch.testing.assert_close(*grads, rtol=tolerance, atol=max(tolerance / 10, 1e-12))


@pytest.fixture(autouse=True)
def float64():
    "Theirs makes its constants in the default type."
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("case", PAIRS)
def test_pair_losses_agree(case):
    (ours,), theirs, *tolerance = PAIRS[case]
    for x, y in batches():
        agree(create_loss(case.partition(",")[0], **ours), theirs(), x, y, *(tolerance or [1e-10]))


@pytest.mark.parametrize("case", PROXIES)
def test_proxy_losses_agree(case):
    torch.manual_seed(0)
    (params,), theirs, *tolerance = PROXIES[case]
    for x, y in batches():
        ours, other = create_loss(case.partition(",")[0], **SIZES, **params).double(), theirs().double()
        (weight,) = other.parameters()
        table = ours.proxies.detach().flatten(0, -2)
        weight.data = table.clone() if weight.shape == table.shape else table.T.clone()
        agree(ours, other, x, y, *(tolerance or [1e-10]))
        mine, yours = (torch.autograd.grad(loss(x, y), p)[0] for loss, p in ((ours, ours.proxies), (other, weight)))
        mine = mine.flatten(0, -2)
        torch.testing.assert_close(
            mine, yours if yours.shape == mine.shape else yours.T, rtol=max(1e-5, 10 * (tolerance or [0])[0]), atol=1e-8
        )


def test_histogram_agrees():
    for x, y in batches():
        agree(create_loss("histogram"), losses.HistogramLoss(100), x, y, 1e-9)


def test_angular_agrees_on_unit_vectors():
    # theirs does not normalise the negatives, so only the part of the gradient across the vectors can agree
    for x, y in batches():
        z = torch.nn.functional.normalize(x).requires_grad_()
        values = [loss(z, y) for loss in (create_loss("angular", preset="pml"), losses.AngularLoss(40))]
        assert values[0].item() == pytest.approx(values[1].item(), rel=1e-10)
        grads = [torch.autograd.grad(value, z)[0] for value in values]
        across = [g - (g * z).sum(1, keepdim=True) * z for g in grads]
        torch.testing.assert_close(*across, rtol=1e-9, atol=1e-12)


def test_index_tuples_work_in_both_directions():
    for x, y in batches():
        theirs = miners.MultiSimilarityMiner(0.1)(x, y)
        loss = create_loss("contrastive", variant="pml")
        assert loss(x, y, indices_tuple=theirs).item() == pytest.approx(
            losses.ContrastiveLoss()(x, y, theirs).item(), rel=1e-10
        )
        ours = create_miner("multi_similarity")(x, y)
        assert losses.MultiSimilarityLoss()(x, y, ours).item() == pytest.approx(
            create_loss("multi_similarity")(x, y).item(), rel=1e-10
        )
        triplets = create_miner("hard")(x, y)
        hardest = create_loss("triplet", squared=False, reduction="active")(x, y, indices_tuple=triplets)
        assert losses.TripletMarginLoss(0.2)(x, y, triplets).item() == pytest.approx(hardest.item(), rel=1e-10)


@pytest.mark.parametrize(
    "ours, theirs",
    [
        (("multi_similarity", {}), lambda: miners.MultiSimilarityMiner(0.1)),
        (("hard", {}), lambda: miners.BatchHardMiner()),
        (("easy_positive", dict(negative="hard")), lambda: miners.BatchEasyHardMiner("easy", "hard")),
        (("easy_positive", {}), lambda: miners.BatchEasyHardMiner("easy", "semihard")),
    ],
)
def test_miners_choose_the_same(ours, theirs):
    for x, y in batches():
        mine, yours = (
            torch.stack(to_masks(miner(x, y), (len(x), len(x))))
            for miner in (create_miner(ours[0], **ours[1]), theirs())
        )
        assert mine.equal(yours)


def test_manifold_agrees():
    # theirs inverts the matrix in float32
    for x, y in batches():
        ours = create_loss("manifold_proxy", **SIZES, num_proxies=C).double()
        theirs = losses.ManifoldLoss(l=D, K=C).double()
        ours.meta[:] = torch.arange(C)
        ours.meta_proxies.data = theirs.proxies.detach().clone()
        assert ours(x, y).item() == pytest.approx(theirs(x, indices_tuple=y).item(), rel=1e-5)
