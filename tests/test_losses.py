"What every loss of the registry promises."

import os

import pytest
import torch

from dml_nb.core.class_queues import ClassQueues
from dml_nb.core.golden import fixture, golden_value
from dml_nb.core.similarity import match_masks
from dml_nb.losses import calibrate, create_loss, deviation, list_losses, loss_parameters
from dml_nb.losses.base import list_presets, takes_ids, to_indices
from dml_nb.losses.hierarchical_proxy import group_counts
from dml_nb.losses.miners import HardMiner, create_miner, list_miners
from dml_nb.losses.pair_base import PairLoss
from dml_nb.models.embedder import EmbeddingHead
from dml_nb.training.learner import dml_learner, feature_dls

C, D = 7, 16
EARLY_START = {"start_epoch": 0, "start_iteration": 0}
# options without random draws, for losses that draw pairs or triplets at random
DETERMINISTIC = {
    "triplet": dict(rule="all"),
    "margin": dict(rule="all"),
    "divide_and_conquer": dict(pair_params=dict(rule="all")),
    "mic": dict(pair_params=dict(rule="all")),
    "npair": dict(pairs="first"),
    "angular": dict(pairs="all"),
}


def parameters_of(name: str):
    "Parameters that `create_loss` passes to the loss of this name."
    return loss_parameters(name)


def build(name: str, **params):
    "The loss with schedules that start at once."
    params = {key: value for key, value in EARLY_START.items() if key in parameters_of(name)} | params
    torch.manual_seed(0)
    return create_loss(name, C, D, **params)


def batch(size: int = 24, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    embeddings = torch.randn(size, D, generator=generator, dtype=torch.float64).to(dtype)
    return embeddings, torch.randint(0, C, (size,), generator=generator)


def value_of(loss, x, y):
    "The value of the loss, with the same random draws at every call."
    torch.manual_seed(2)
    return loss(x, y)


def fill(loss, dtype=torch.float32):
    "Put a batch into the memory, if the loss has one."
    if hasattr(loss, "remember"):
        loss.remember(*batch(50, dtype))
    return loss


GOLDEN = {
    "CBML log": ("cbml", dict(h=0.1)),
    "CBML sqrt": ("cbml", dict(h=0.1, kind="sqrt")),
    "CBML const": ("cbml", dict(h=0.1, kind="const")),
    "CBML log hw=.2": ("cbml", {}),
    "CBML log weight=0": ("cbml", dict(gamma=0.0)),
    "CBML log non-adaptive": ("cbml", dict(h=0.1, negatives="top100")),
    "MS official 2/40": ("multi_similarity", dict(preset="official_code")),
    "MS official 2/50": ("multi_similarity", {}),
    "Deep_Metric Contrastive": ("contrastive", {}),
    "Deep_Metric HardMining": ("hard_mining", {}),
    "PML Contrastive": ("contrastive", dict(variant="pml")),
    "PML Circle m.4 g80": ("circle", {}),
    "PML TupletMargin 5.73/64": ("tuplet_margin", {}),
    "PML NCA": ("nca", {}),
    "PML Angular 40": ("angular", dict(preset="pml")),
    "PML Lifted original on unit vectors alpha=1": ("lifted_structure", dict(normalize=True)),
    "PML IntraPairVariance": ("intra_pair_variance", {}),
    "PML RankedList m.4 Tn10": ("ranked_list", dict(preset="pml")),
    "Ranked list (CBML repo)": ("ranked_list", dict(preset="cbml_repo")),
    "Histogram (CBML repo) 101 steps": ("histogram", {}),
    "Triplet all (CBML repo) m=1": ("triplet", dict(preset="cbml_repo")),
    "Margin loss over all triplets beta=1.2 m=.2": ("margin", dict(rule="all")),
    "EPHN": ("easy_positive", dict(preset="ephn")),
    "EPSHN": ("easy_positive", {}),
    "Cluster (CBML repo) m=10": ("cluster", dict(preset="official_code")),
    "Cluster (CBML repo) m=.3": ("cluster", {}),
    "PML NormSoftmax T.05": ("norm_softmax", {}),
    "PML CosFace .35/64": ("cosface", {}),
    "PML ArcFace 28.6/64": ("arcface", {}),
    "CosFace s=30 m=.35": ("cosface", dict(preset="muggle_wang")),
    "ArcFace s=16 m=.5rad": ("arcface", dict(preset="revisiting")),
    "Proxy Anchor": ("proxy_anchor", {}),
    "ProxyNCA dichotomies s=3/3 sm=.1": ("proxy_nca", {}),
    "ProxyNCA dichotomies 1/8 (SOP) sm=.1": ("proxy_nca", dict(preset="sop")),
    "ProxyNCA classic (pos excluded)": ("proxy_nca", dict(preset="paper")),
    "ProxyNCA++ prob": ("proxy_nca_pp", {}),
    "SoftTriple": ("softtriple", dict(proxies_per_class=3)),
    "XBM contrastive batch": ("contrastive", {}),
    "CP K=1, S_p only == Proxy Anchor": ("cp_proxy_anchor", dict(proxies_per_class=1)),
}
CP = {
    "CP+PA K=3": ("proxy_anchor", {}),
    "CP+NCA scale=18 positive excluded": ("proxy_nca", {}),
    "CP+NCA scale=18 positive included": ("proxy_nca", dict(include_positive=True)),
    "CP+SoftTriple la=20 d=.01 no regulariser": ("softtriple", dict(tau=0.0)),
}
CP_FORMS = {
    "S_p": dict(start_epoch=12),
    "S_p+S_g": dict(start_epoch=0),
}
for row, (host, params) in CP.items():
    for sharpness in (1, 10):
        for form, more in CP_FORMS.items():
            GOLDEN[f"{row} 1/gamma={sharpness} {form}"] = (
                f"cp_{host}",
                dict(proxy_temp=1 / sharpness, calib_lambda=0.0) | params | more,
            )


def on_fixture(name, **params):
    "The loss with the proxies of the fixture and its embeddings in the queues."
    fix = fixture()
    loss = create_loss(name, fix.num_classes, fix.embedding_size, **params).double()
    if hasattr(loss, "proxies"):
        proxies = fix.proxies if loss.proxies.numel() == fix.proxies.numel() else fix.multi_proxies
        loss.proxies.data = proxies.reshape(loss.proxies.shape).clone()
    if name.startswith("cp_"):
        loss.remember(fix.embeddings, fix.labels)
    return loss


@pytest.mark.parametrize("quantity", GOLDEN)
def test_golden_values(quantity):
    fix = fixture()
    name, params = GOLDEN[quantity]
    value = on_fixture(name, **params)(fix.embeddings, fix.labels).item()
    assert value == pytest.approx(golden_value(quantity), rel=1e-11)


@pytest.mark.parametrize("host", [name for name in list_losses() if name.startswith("cp_")])
def test_golden_calibration_under_every_host(host):
    fix = fixture()
    calibrated, uncalibrated = [on_fixture(host, start_epoch=0, calib_lambda=weight) for weight in (1.0, 0.0)]
    difference = calibrated(fix.embeddings, fix.labels).item() - uncalibrated(fix.embeddings, fix.labels).item()
    expected = golden_value("CP L_c squared norm, class SUM (4 filled classes), normalised")
    assert difference == pytest.approx(expected, rel=1e-11)


def test_golden_deviation():
    fix = fixture()
    found = deviation(fix.embeddings, fix.labels, fix.multi_proxies)
    assert found["center"] == pytest.approx(golden_value("CP deviation Eq10 centre form"), rel=1e-12)
    assert found["pairwise"] == pytest.approx(golden_value("CP deviation Eq10 pairwise"), rel=1e-12)


def memory_of_18():
    "The six older entries of the golden values with their labels."
    fix = fixture()
    return torch.nn.functional.normalize(fix.unit[0::2].flip(0) + 0.1 * fix.unit[1::2]), fix.labels[0::2].flip(0)


@pytest.mark.parametrize(
    "name, params",
    [
        ("xbm", dict(start_iteration=0)),
        ("xbm", dict(start_iteration=0, self_eps=None)),
        ("xbm", dict(start_iteration=0, preset="official_code")),
        ("mcl", {}),
    ],
)
def test_golden_cross_batch_memory(name, params):
    fix, loss = fixture(), on_fixture(name, **params)
    loss.remember(*memory_of_18())
    assert loss.memory_term(fix.embeddings, fix.labels).item() == pytest.approx(
        golden_value("XBM contrastive memory(18)"), rel=1e-12
    )
    assert loss(fix.embeddings, fix.labels).item() == pytest.approx(
        golden_value("XBM contrastive batch") + golden_value("XBM contrastive memory(18)"), rel=1e-12
    )


def test_golden_prism():
    fix, loss = fixture(), on_fixture("prism", noise_rate=0.25)
    loss.memory.enqueue(*map(torch.cat, zip(memory_of_18(), (fix.embeddings, fix.labels))))
    loss.update_centers(torch.tensor([0, 2]))
    keep, _ = loss.select_clean(fix.embeddings, fix.labels)
    assert loss.memory_term(fix.embeddings, fix.labels, keep).item() == pytest.approx(
        golden_value("PRISM memory contrastive loss"), rel=1e-12
    )


def test_golden_virtual_classes():
    fix, loss = fixture(), on_fixture("memvir", host_params=dict(temperature=1 / 16), steps=2, gap=1, start_epoch=0)
    for t in range(6):
        loss.proxies.data = fix.proxies + 0.1 * t * fix.proxies.roll(1, 1)
        z = torch.nn.functional.normalize(fix.unit + 0.05 * t * fix.unit.roll(1, 0))
        expected = golden_value(f"MemVir NormSoftmax s16 N2 M1 step {t}")
        assert loss(z, fix.labels).item() == pytest.approx(expected, rel=1e-12)
        loss.remember(z, fix.labels)


@pytest.mark.parametrize("host, quantity", [("norm_softmax", "NormSoftmax"), ("proxy_nca", "ProxyNCA")])
def test_golden_proxy_synthesis(host, quantity):
    loss = on_fixture("proxy_synthesis", host=host, lam=0.3)
    assert loss(fixture().embeddings, torch.arange(12) % 4).item() == pytest.approx(
        golden_value(f"Proxy Synthesis {quantity} lam=.3"), rel=1e-12
    )


@pytest.mark.parametrize("name", list_losses())
def test_gradient_in_float64(name):
    loss = fill(build(name).double(), torch.float64)
    if not loss.exact_gradient:
        pytest.skip("the method stops or reverses a part of the gradient; its notebook checks the rest")
    x, y = batch(8, torch.float64)
    names, values = zip(*loss.named_parameters()) if list(loss.parameters()) else ((), ())

    def value(x, *params):
        torch.manual_seed(2)
        return torch.func.functional_call(loss, dict(zip(names, params)), (x, y))

    leaves = [x.requires_grad_(), *(v.detach().clone().requires_grad_() for v in values)]
    # with more than 300 numbers, gradcheck compares random directions instead of every partial derivative
    assert torch.autograd.gradcheck(value, leaves, fast_mode=sum(v.numel() for v in leaves) > 300)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", list_losses())
def test_half_precision_with_hard_duplicates(name, dtype, autocast):
    x, y = batch(512)
    x[100:150], y[100:150] = x[0], y[0]
    x[150:200] = x[0]
    x[200] = 0
    x = x.to(dtype)
    exact = value_of(fill(build(name).double(), torch.float64), x.double(), y).item()
    loss = fill(build(name))
    x = x.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        value = value_of(loss, x, y)
    value.backward()
    assert value.dtype == torch.float32 and x.grad.isfinite().all()
    assert value.item() == pytest.approx(exact, rel=1e-3)


@pytest.mark.parametrize(
    "labels", [[0] * 6, [0, 1, 2, 3, 4, 5], [3], []], ids=["one class", "all distinct", "batch of one", "empty"]
)
@pytest.mark.parametrize("name", list_losses())
def test_degenerate_batches(name, labels):
    loss = fill(build(name))
    x = torch.randn(len(labels), D, requires_grad=True)
    value = loss(x, torch.tensor(labels, dtype=torch.long), None)
    value.backward()
    assert value.isfinite() and x.grad.isfinite().all()
    if not loss.last_active:
        assert value.item() == 0 and x.grad.abs().sum() == 0
    if not labels:
        assert loss.last_active == 0


@pytest.mark.parametrize("name", list_losses())
def test_every_parameter_gets_a_gradient_and_is_in_the_optimiser(name):
    loss = fill(build(name))
    x, y = batch(200)
    loss(x.requires_grad_(), y).backward()
    assert x.grad.abs().sum() > 0
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in loss.parameters())
    x, y = batch()
    learn = dml_learner(feature_dls(x, y, x, y, batch_size=12), EmbeddingHead(D, D), loss)
    learn.create_opt()
    held = {id(p) for p, *_ in learn.opt.all_params()}
    assert held == {id(p) for p in [*learn.model.parameters(), *loss.parameters()]}


@pytest.mark.parametrize("name", list_losses())
def test_state_dict_round_trip(name):
    "A loaded state continues exactly, also in the middle of a schedule and without a call of `set_epoch`."
    scheduled = dict(start_epoch=1) if "start_epoch" in parameters_of(name) else {}
    loss, twin = build(name, **scheduled), build(name, **scheduled)
    if scheduled:
        loss.set_epoch(1)
    fill(loss)
    twin.load_state_dict(loss.state_dict())
    assert twin.epoch == loss.epoch == bool(scheduled)
    x, y = batch()
    for _ in range(3):
        assert value_of(twin, x, y).item() == value_of(loss, x, y).item()
        for each in (loss, twin):
            if hasattr(each, "remember"):
                each.remember(x, y)


@pytest.mark.parametrize("name", list_losses())
def test_only_losses_marked_as_normalised_ignore_the_length(name):
    loss = fill(build(name).double(), torch.float64)
    x, y = batch(dtype=torch.float64)
    of_unit_vectors = value_of(loss, torch.nn.functional.normalize(x), y).item()
    ignores_length = of_unit_vectors == pytest.approx(value_of(loss, x, y).item(), rel=1e-12)
    assert ignores_length == loss.normalised


@pytest.mark.parametrize("name", list_losses())
def test_order_of_the_batch_and_numbering_of_the_classes_do_not_matter(name):
    if name in ("npair", "proxy_synthesis"):
        pytest.skip("this loss pairs samples at random or by their order in the batch")
    loss = fill(build(name, **DETERMINISTIC.get(name, {})).double(), torch.float64)
    x, y = batch(dtype=torch.float64)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(3))
    expected = value_of(loss, x, y).item()
    assert value_of(loss, x[order], y[order]).item() == pytest.approx(expected, rel=1e-10)
    if not list(loss.parameters()) and all(key.split(".")[-1] == "at_epoch" for key in loss.state_dict()):
        assert value_of(loss, x, (y + 3) % C).item() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("name", list_losses())
def test_compiled_gives_the_same_value(name):
    # "aot_eager" traces forward and backward like the full compiler and skips half a minute of code generation a loss
    backend = os.environ.get("DML_NB_COMPILE", "aot_eager")
    loss = fill(build(name, **DETERMINISTIC.get(name, {})))
    x, y = batch()
    grads = []
    for each in (loss, torch.compile(loss, backend=backend)):
        leaf = x.clone().requires_grad_()
        value = value_of(each, leaf, y)
        grads.append((value.detach(), *torch.autograd.grad(value, leaf)))
    torch.compiler.reset()
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", list_losses())
def test_bad_input_is_named(name):
    loss = build(name)
    x, y = batch()
    for bad_arguments, word in [
        ((x[0], y), "shape"),
        ((x, y[:-1]), "labels"),
        ((x, y.float()), "integers"),
        ((x.index_fill(0, torch.tensor([3]), float("nan")), y), "row 3"),
        ((x.index_fill(0, torch.tensor([3]), float("inf")), y), "row 3"),
    ]:
        with pytest.raises(ValueError, match=word):
            loss(*bad_arguments)
    if loss.embedding_size:
        with pytest.raises(ValueError, match="embedding_size"):
            loss(x[:, :-1], y)
    if loss.num_classes:
        with pytest.raises(ValueError, match=f"label {C} is outside"):
            loss(x, y.clamp_min(C))
        with pytest.raises(ValueError, match="label -1 is outside"):
            loss(x, y - C - 1 + (C - y))


LABEL_TYPES = [getattr(torch, kind) for kind in "uint8 int8 int16 int32 uint16 uint32 uint64".split()]


@pytest.mark.parametrize("dtype", LABEL_TYPES, ids=str)
@pytest.mark.parametrize("name", list_losses())
def test_labels_may_be_integers_of_any_type(name, dtype):
    "Labels and ids of images, in the loss and in its memory."
    (x, y), ids, values = batch(), torch.arange(24), []
    for kind in (torch.int64, dtype):
        loss = build(name)
        with_ids = (ids.to(kind),) if takes_ids(loss) else ()
        for _ in range(2 if hasattr(loss, "remember") else 0):
            loss.remember(x, y.to(kind), *with_ids)
        torch.manual_seed(2)
        values.append(loss(x + 0.1, y.to(kind), **dict(zip(["sample_ids"], with_ids))).item())
    assert values[0] == values[1]


@pytest.mark.parametrize("dtype", LABEL_TYPES, ids=str)
def test_miners_references_memories_and_deviation_take_labels_of_any_type(dtype):
    x, y = batch()
    for miner in map(create_miner, list_miners()):
        for refs in ((), (x, y)):
            torch.manual_seed(2)
            expected = miner(x, y, *refs)
            torch.manual_seed(2)
            found = miner(x, y.to(dtype), *(ref if ref is x else ref.to(dtype) for ref in refs))
            assert all(map(torch.equal, found, expected))
    loss, pairs = create_loss("contrastive"), to_indices(*match_masks(y))
    assert loss(x, y.to(dtype), ref_emb=x, ref_labels=y.to(dtype)).equal(loss(x, y, ref_emb=x, ref_labels=y))
    assert loss(x, y, indices_tuple=[part.to(dtype) for part in pairs]).equal(loss(x, y, indices_tuple=pairs))
    memories = [create_loss("xbm", C, D, start_iteration=0) for _ in range(2)]
    for memory, labels in zip(memories, (y, y.to(dtype))):
        memory.remember(x, labels)
    assert memories[0].memory_term(x, y).equal(memories[1].memory_term(x, y.to(dtype)))
    queues = [ClassQueues(C, D) for _ in range(2)]
    for queue, labels in zip(queues, (y, y.to(dtype))):
        queue.enqueue(x, labels)
    assert queues[0].mean.equal(queues[1].mean)
    proxies = torch.randn(C, D)
    assert deviation(x, y.to(dtype), proxies) == deviation(x, y, proxies)


@pytest.mark.parametrize("name", list_losses())
def test_a_trainer_may_scale_the_value_in_place(name):
    "The trainers of pytorch-metric-learning multiply the value by a weight in this way."
    x, y = batch()
    x.requires_grad_()
    loss, grads = fill(build(name)), []
    for in_place in (False, True):
        value = value_of(loss, x * 1, y)
        if in_place:
            value *= 0.5
        else:
            value = value * 0.5
        grads.append(torch.autograd.grad(value, x)[0])
    assert grads[0].equal(grads[1])


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda x: x.to_sparse(), "embeddings must be a dense tensor, got the layout torch.sparse_coo"),
        (lambda x: x.to("meta"), "embeddings must not be on the device 'meta'"),
        (lambda x: x.tolist(), "embeddings must be a tensor, got list"),
        (lambda x: x * torch.nan, "NaN or infinity, first in row 0"),
    ],
)
def test_embeddings_that_are_no_dense_numbers_are_named(change, message):
    x, y = batch()
    calls = [build("triplet"), build("cp_proxy_anchor"), create_miner("hard"), build("cp_proxy_anchor").remember]
    for call in [*calls, build("prism").remember, build("xbm").remember, build("memvir").remember]:
        with pytest.raises(ValueError, match=message):
            call(change(x), y)


@pytest.mark.parametrize("name", [["triplet"], ("triplet",), None, 5, {"triplet"}, torch.nn.Identity()], ids=str)
def test_the_name_of_a_loss_is_a_string_or_a_dictionary(name):
    with pytest.raises(ValueError, match="the name of a loss is a string, or {name: weight}"):
        create_loss(name, C, D)


@pytest.mark.parametrize(
    "name, params, message",
    [
        ("contrastive", dict(preset=["pml"]), "unknown preset"),
        ("contrastive", dict(variant=["pml"]), "unknown variant"),
        ("contrastive", dict(miner=["hard"]), r"miner must have .* got \['hard'\]"),
        ("contrastive", dict(miner=HardMiner), "pass a created miner"),
        ("binomial_deviance", dict(variant=["paper"]), "unknown variant"),
        ("cbml", dict(kind=["log"]), "unknown kind"),
        ("ranked_list", dict(margin="a"), "margin must be a number, got 'a'"),
        ("proxy_anchor", dict(delta="a"), "delta must be a number, got 'a'"),
        ("proxy_anchor", dict(delta=float("nan")), "delta must be a number, got nan"),
        ("cp_proxy_anchor", dict(delta=True), "delta must be a number, got True"),
        ("smooth_proxy_anchor", dict(delta="a"), "delta must be a number"),
        ("smooth_proxy_anchor", dict(conf_center=None), "conf_center must be a number, got None"),
        ("xbm", dict(pair_params=5), "pair_params must be a dictionary, got 5"),
        ("xbm", dict(pair_loss=["contrastive"]), "the name of a loss is a string"),
        *[
            (name, {key: [1]}, message)
            for name in ("memvir", "proxy_synthesis", "hpl")
            for key, message in (("host", "unknown host"), ("host_params", "host_params must be a dictionary, got"))
        ],
    ],
)
def test_parameters_of_a_wrong_type_are_named(name, params, message):
    with pytest.raises(ValueError, match=message):
        create_loss(name, C, D, **params)


def test_names_of_a_wrong_type_are_named():
    with pytest.raises(ValueError, match="unknown miner"):
        create_miner(["hard"])
    with pytest.raises(ValueError, match="unknown host"):
        calibrate(["proxy_nca"], C, D)
    with pytest.raises(ValueError, match="unknown loss"):
        loss_parameters(["triplet"])


def test_a_delta_below_0_is_possible():
    x, y = batch()
    assert build("proxy_anchor", delta=-0.1)(x, y) < build("proxy_anchor", delta=0.1)(x, y)


@pytest.mark.cuda
@pytest.mark.parametrize("name", list_losses())
def test_same_value_on_the_gpu(name):
    x, y = batch()
    loss = fill(build(name, **DETERMINISTIC.get(name, {})))
    expected = loss(x, y).item()
    assert loss.cuda()(x.cuda(), y.cuda()).item() == pytest.approx(expected, rel=1e-5)
    with torch.autocast("cuda", torch.float16):
        assert loss(x.half().cuda(), y.cuda()).item() == pytest.approx(expected, rel=1e-2)


# parameters that must be positive
SCALES = (
    "scale",
    "scale_x",
    "scale_p",
    "gamma",
    "alpha",
    "temperature",
    "proxy_temp",
    "sigma",
    "proxies_per_class",
    "num_proxies",
    "capacity",
    "nodes",
    "num_classes",
    "embedding_size",
)


@pytest.mark.parametrize("name", list_losses())
def test_impossible_parameters_are_named(name):
    parameters = parameters_of(name)
    for key in SCALES:
        optional = key in ("num_classes", "embedding_size") and key in parameters and parameters[key].default is None
        # in these two losses alpha is no scale: a similarity border and a margin
        other_meaning = (name, key) in {("ranked_list", "alpha"), ("lifted_structure", "alpha")}
        if key in parameters and not optional and not other_meaning:
            with pytest.raises(ValueError, match=key):
                create_loss(name, **(dict(num_classes=C, embedding_size=D) | {key: -1}))


@pytest.mark.parametrize(
    "name, params, message",
    [
        ("contrastive", dict(negatives="hardest"), "unknown choice of negatives 'hardest': did you mean 'hard'"),
        ("contrastive", dict(margin=-3), "margin must be at least -1, got -3"),
        ("binomial_deviance", dict(beta=0), "beta must be at least 0.0001"),
        ("binomial_deviance", dict(alpha=-1.0), "alpha must be at least"),
        ("multi_similarity", dict(beta=-1), "beta must be at least 0.0001, got -1"),
        ("multi_similarity", dict(alpha="2"), "alpha must be a number"),
        ("circle", dict(gamma=0), "gamma must be at least 0.0001, got 0"),
        ("circle", dict(m=-0.1), "m must be at least 0"),
        ("cbml", dict(negatives="top10"), "unknown negatives 'top10'"),
        ("cbml", dict(beta_n=0.0), "beta_n must be at least"),
        ("cbml", dict(gamma=-1.0), "gamma must be at least 0"),
        ("cbml", dict(h=1.5), "must be at most 1, got 1.5"),
        ("cbml", dict(omega_p="a"), "omega_p must be a number"),
        ("triplet", dict(margin=-1), "margin must be at least 0"),
        ("triplet", dict(reduction="sum"), "unknown reduction"),
        ("margin", dict(learn_beta="classes"), "did you mean 'class'"),
        ("margin", dict(rule="distance"), "did you mean 'distance_weighted'"),
        ("margin", dict(beta=-1), "beta must be at least 0"),
        ("tuplet_margin", dict(margin=-1), "margin must be at least 0"),
        ("tuplet_margin", dict(scale=0), "scale must be at least 0.0001, got 0"),
        ("intra_pair_variance", dict(pos_eps=-1), "pos_eps must be at least 0"),
        ("intra_pair_variance", dict(neg_eps=-0.1), "neg_eps must be at least 0"),
        ("lifted_structure", dict(alpha="a"), "alpha must be a number"),
        ("lifted_structure_cos", dict(beta=0.0), "beta must be at least"),
        ("lifted_structure_cos", dict(slack=None, hard_mining=True), "slack must be a number"),
        ("easy_positive", dict(sigma=0.0), "sigma must be at least"),
        ("angular", dict(angle=80), "at most 70 degrees"),
        ("angular", dict(angle=0), "angle must be at least"),
        ("angular", dict(pairs="al"), "unknown choice of pairs 'al'"),
        ("angular", dict(pairs="all", normalize=False), "needs unit vectors"),
        *[("ranked_list", {key: -1}, f"{key} must be at least 0") for key in ("margin", "alpha", "t_neg", "t_pos")],
        ("norm_softmax", dict(init="zeros"), "unknown init 'zeros'"),
        ("cosface", dict(scale=0), "scale must be at least 0.0001"),
        ("arcface", dict(scale=0), "scale must be at least 0.0001"),
        ("arcface", dict(margin=-0.1), "margin must be at least 0"),
        ("proxy_anchor", dict(proxy_temp=0), "proxy_temp must be at least 0.0001"),
        ("proxy_nca", dict(scale_p=0), "scale_p must be at least 0.0001"),
        *[("softtriple", {key: 0}, f"{key} must be at least") for key in ("proxies_per_class", "scale", "proxy_temp")],
        *[("softtriple", {key: -1}, f"{key} must be at least 0") for key in ("tau", "margin")],
        ("manifold_proxy", dict(context=-1), "context must be at least 0"),
        ("cross_entropy", dict(num_classes=0), "num_classes must be at least 1"),
        ("cross_entropy", dict(embedding_size=0), "embedding_size must be at least 1"),
        ("xbm", dict(memory_size=0), "memory_size must be at least 1, got 0"),
        ("xbm", dict(start_iteration=-1), "start_iteration must be at least 0"),
        ("xbm", dict(pair_loss="contrastiv"), "did you mean 'contrastive'"),
        ("xbm", dict(pair_params=dict(margn=1.0)), "did you mean 'margin'"),
        ("xbm", dict(pair_loss="norm_softmax"), "'norm_softmax' cannot be compared with a memory"),
        ("xbm", dict(pair_loss="lifted_structure"), "'lifted_structure' cannot be compared with a memory"),
        ("xbm", dict(enqueue="later"), "unknown enqueue 'later'"),
        ("xbm", dict(memory_dtype="float23"), "did you mean 'float32'"),
        ("mcl", dict(weight=-1.0), "weight must be at least 0"),
        ("mcl", dict(start_epoch=-1), "start_epoch must be at least 0"),
        ("prism", dict(noise_rate=1.5), "must be below 1, got 1.5"),
        ("prism", dict(window=0), "window must be at least 1"),
        ("memvir", dict(host="proxy_ancor"), "did you mean 'proxy_anchor'"),
        ("memvir", dict(steps=0), "steps must be at least 1"),
        ("memvir", dict(host_params=dict(scale=2)), "parameter of the host 'norm_softmax' 'scale'"),
        ("memvir", dict(host_params=dict(temperature=0)), "temperature must be at least 0.0001"),
        ("memvir", dict(queue_dtype="float17"), "did you mean 'float16'"),
        ("proxy_synthesis", dict(mu=1.5), "mu and lam are shares"),
        ("proxy_synthesis", dict(mu=-1), "mu must be at least 0"),
        ("proxy_synthesis", dict(lam=-0.1), "lam must be at least 0"),
        ("proxy_synthesis", dict(lam=2), "got mu=1.0, lam=2"),
        ("proxy_synthesis", dict(alpha=0), "alpha must be at least 0.001"),
        ("proxy_synthesis", dict(host="pa"), "unknown host 'pa'"),
        ("hpl", dict(coarse_weight=-1), "coarse_weight must be at least 0"),
        ("hpl", dict(update_every=0), "update_every must be at least 1"),
        ("hpl", dict(start_epoch=-1), "start_epoch must be at least 0"),
        ("hpl", dict(host="anchor"), "unknown host 'anchor'"),
        ("hpl", dict(coarse_proxies="centroid"), "did you mean 'centroids'"),
        ("adversarial", dict(chunks=3), "cannot be split into 3 equal chunks"),
        ("adversarial", dict(chunks=1), "chunks must be at least 2"),
        ("adversarial", dict(hidden=0), "hidden must be at least 1"),
        ("adversarial", dict(chunks=2.0), "chunks must be a whole number, got 2.0"),
    ],
)
def test_impossible_values_are_named(name, params, message):
    with pytest.raises(ValueError, match=message):
        create_loss(name, **(dict(num_classes=C, embedding_size=D) | params))


@pytest.mark.parametrize(
    "levels, n_coarse, message",
    [
        (2, 101, "nor exceed the 100 classes"),
        (3, (5, 6), "must not grow"),
        (3, 5, "2 numbers for levels=3"),
        (2, 0, "n_coarse must be at least 1"),
        (2, 2.5, "n_coarse must be a whole number"),
        (0, None, "levels must be at least 1"),
    ],
)
def test_impossible_numbers_of_groups_are_named(levels, n_coarse, message):
    with pytest.raises(ValueError, match=message):
        group_counts(100, levels, n_coarse)


def test_adversarial_needs_the_embedding_size():
    with pytest.raises(ValueError, match="needs embedding_size"):
        create_loss("adversarial")


@pytest.mark.parametrize("name", ["norm_softmax", "proxy_anchor", "manifold_proxy"])
def test_a_loss_with_proxies_needs_the_number_of_classes(name):
    with pytest.raises(ValueError, match="needs num_classes"):
        create_loss(name, embedding_size=D)


WHOLE_NUMBERS = (
    "steps",
    "gap",
    "window",
    "warm_up",
    "start_epoch",
    "start_iteration",
    "update_every",
    "levels",
    "n_coarse",
    "memory_size",
    "proxies_per_class",
    "num_proxies",
    "reassign_every",
    "chunks",
    "hidden",
    "sweeps",
    "nodes",
    "k",
)


@pytest.mark.parametrize(
    "name, key",
    [(name, key) for name in list_losses() for key in WHOLE_NUMBERS if key in parameters_of(name)],
)
def test_counts_must_be_whole_numbers(name, key):
    with pytest.raises(ValueError, match=f"{key} must be a whole number"):
        create_loss(name, C, D, **{key: 2.5})


@pytest.mark.parametrize("name", [name for name in list_losses() if "self_eps" in parameters_of(name)])
@pytest.mark.parametrize("value", ["a", -1])
def test_self_eps_is_checked(name, value):
    with pytest.raises(ValueError, match="self_eps must be"):
        create_loss(name, C, D, self_eps=value)


@pytest.mark.parametrize(
    "name, key, params",
    [
        ("lifted_structure_cos", "slack", dict(slack=0.5)),
        ("lifted_structure_cos", "hard_mining", dict(hard_mining=True, miner="multi_similarity")),
        ("binomial_deviance", "slack", dict(slack=0.5)),
        ("binomial_deviance", "slack", dict(slack=0.5, hard_mining=True, miner="hard")),
        ("hard_mining", "slack", dict(slack=0.5, miner="hard")),
        ("multi_similarity", "mining_eps", dict(mining_eps=0.5, miner="hard")),
        ("triplet", "rule", dict(rule="all", miner="hard")),
        ("triplet", "each_pair_once", dict(each_pair_once=True, miner="semi_hard")),
        ("triplet", "fallback", dict(fallback=True, rule="all")),
        ("triplet", "fallback", dict(fallback=True, miner="hard")),
        ("margin", "rule", dict(rule="all", miner="distance_weighted")),
        ("margin", "one_per_anchor", dict(one_per_anchor=True, miner="hard")),
        ("margin", "one_per_anchor", dict(one_per_anchor=True, rule="all")),
        ("margin", "far", dict(far=None, miner="hard")),
        ("margin", "far", dict(far=None, rule="all")),
        ("cbml", "margin", dict(margin=0.3, miner="hard")),
        ("cbml", "negatives", dict(negatives="top100", miner="multi_similarity")),
        ("cbml", "h", dict(gamma=0, h=0.9)),
        ("cbml", "omega_n", dict(omega_n=0.5)),
        ("cbml", "omega_p", dict(omega_p=0.5)),
        ("proxy_anchor", "proxy_temp", dict(proxy_temp=0.01)),
        ("softtriple", "tau", dict(proxies_per_class=1, tau=5)),
        ("softtriple", "proxy_temp", dict(proxies_per_class=1, proxy_temp=3)),
    ],
)
def test_an_option_without_effect_is_an_error(name, key, params):
    with pytest.raises(ValueError, match=f"{key}.* has no effect with"):
        create_loss(name, C, D, **params)


@pytest.mark.parametrize(
    "name, params",
    [
        ("triplet", dict(rule="all", miner="multi_similarity")),
        ("margin", dict(rule="all", miner="multi_similarity")),
        ("cbml", dict(preset="official_code", gamma=0)),
        ("cp_proxy_anchor", dict(preset="sharp", proxies_per_class=1)),
        ("multi_similarity", dict(mining_eps=None, miner="hard")),
        ("softtriple", dict(proxies_per_class=1, tau=0)),
        *[(name, dict(preset=preset)) for name in list_losses() for preset in list_presets(name)],
    ],
)
def test_an_option_with_effect_and_every_preset_build(name, params):
    assert create_loss(name, C, D, **params) is not None


@pytest.mark.parametrize("name", ["triplet", "margin"])
def test_self_eps_drops_named_triplets(name):
    x, y = batch(dtype=torch.float64)
    y[1], x[1] = y[0], x[0]
    positive = (y[:, None] == y) & ~torch.eye(len(y), dtype=torch.bool)
    a, p, n = (positive[:, :, None] & (y[:, None] != y)[:, None]).nonzero(as_tuple=True)
    is_copy = (x[a] == x[p]).all(1)
    assert is_copy.any() and not is_copy.all()
    with_eps, without_eps = build(name, **DETERMINISTIC[name], self_eps=1e-5), build(name, **DETERMINISTIC[name])
    value = with_eps(x, y, indices_tuple=(a, p, n)).item()
    without_copies = without_eps(x, y, indices_tuple=tuple(part[~is_copy] for part in (a, p, n))).item()
    assert value == pytest.approx(without_copies, rel=1e-12)
    assert value != pytest.approx(without_eps(x, y, indices_tuple=(a, p, n)).item(), rel=1e-6)


TAKE_INDEX_TUPLES = [name for name in list_losses() if isinstance(build(name), PairLoss)] + ["npair", "angular"]


@pytest.mark.parametrize(
    "parts, word",
    [
        ([0], "got 1"),
        ([0, 1, 2, 3, 4], "got 5"),
        ([0, 24, 3], "names reference 24, but there are 24"),
        ([-1, 1, 3], "names anchor -1"),
        ([0, 1, 24, 3], "names anchor 24"),
    ],
)
@pytest.mark.parametrize("name", TAKE_INDEX_TUPLES)
def test_wrong_index_tuples_are_named(name, parts, word):
    x, y = batch()
    with pytest.raises(ValueError, match=word):
        build(name)(x, y, indices_tuple=tuple(torch.tensor([part]) for part in parts))


@pytest.mark.parametrize(
    "given, message",
    [
        (5, "must be a tuple of vectors .* got int"),
        (torch.zeros(3, 4), "got Tensor"),
        ((1, 2, 3), "part 0 of indices_tuple must be a tensor, got int"),
        ((torch.arange(3), torch.arange(2), torch.arange(3)), r"got the shapes \[\(3,\), \(2,\), \(3,\)\]"),
        ((torch.zeros(3),) * 4, "must hold whole numbers, got .*float32"),
        ((torch.zeros(3) > 0,) * 3, "must hold whole numbers, got .*bool"),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", TAKE_INDEX_TUPLES)
def test_what_is_no_index_tuple_is_named(name, given, message):
    x, y = batch()
    with pytest.raises(ValueError, match=message):
        build(name)(x, y, indices_tuple=given)


@pytest.mark.parametrize("params", [{}, dict(pairs="all")])
def test_wrong_index_tuples_are_named_by_both_forms_of_angular(params):
    x, y = batch()
    with pytest.raises(ValueError, match="names reference 24"):
        build("angular", **params)(x, y, indices_tuple=(torch.tensor([0]), torch.tensor([24])))


@pytest.mark.parametrize("miner", list_miners())
@pytest.mark.parametrize("name", [name for name in list_losses() if "miner" in parameters_of(name)])
def test_every_miner_works_by_name(name, miner):
    x, y = batch(60)
    x.requires_grad_()
    value = create_loss(name, C, D, miner=miner)(x, y)
    assert value.isfinite() and torch.autograd.grad(value, x)[0].isfinite().all()


def test_an_index_tuple_replaces_the_mining_of_lifted_structure():
    fix = fixture()
    plain, mined = (create_loss("lifted_structure_cos", hard_mining=mining) for mining in (False, True))
    everything = to_indices(*match_masks(fix.labels))
    assert mined(fix.unit, fix.labels, indices_tuple=everything).item() == pytest.approx(
        plain(fix.unit, fix.labels).item(), rel=1e-12
    )
    assert mined(fix.unit, fix.labels).item() != pytest.approx(plain(fix.unit, fix.labels).item(), rel=1e-6)


@pytest.mark.parametrize("option", ["indices_tuple", "ref_emb", "ref_labels"])
def test_a_sum_takes_no_pairs_unless_a_part_does(option):
    x, y = batch()
    values = dict(indices_tuple=to_indices(*match_masks(y)), ref_emb=x, ref_labels=y)
    with pytest.raises(ValueError, match=f"no part of the sum of proxy_anchor, center takes {option}"):
        create_loss({"proxy_anchor": 1.0, "center": 0.01}, C, D)(x, y, **{option: values[option]})
    both = create_loss({"proxy_anchor": 1.0, "contrastive": 1.0}, C, D)
    pairs = values["indices_tuple"]
    assert both(x, y, indices_tuple=pairs).item() == pytest.approx(both(x, y).item(), rel=1e-6)


class EmptyMiner(torch.nn.Module):
    "A miner that selects no pairs."

    def mine(self, sim_BN, pos_BN, neg_BN):
        return torch.zeros_like(pos_BN), torch.zeros_like(neg_BN)


@pytest.mark.parametrize("name", [name for name in list_losses() if isinstance(build(name), PairLoss)])
def test_a_miner_that_returns_nothing_gives_zero(name):
    x, y = batch()
    x.requires_grad_()
    empty_tuple = tuple(torch.zeros(0, dtype=torch.long) for _ in range(4))
    values = [build(name)(x, y, indices_tuple=empty_tuple)]
    if "miner" in parameters_of(name):
        values.append(create_loss(name, C, D, miner=EmptyMiner())(x, y))
    for value in values:
        assert value.item() == 0 and torch.autograd.grad(value, x)[0].abs().sum() == 0
