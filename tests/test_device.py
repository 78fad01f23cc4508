"""Where every tensor lives: torch's "meta", a device without values, stands in for a GPU.

What no run on a CPU can see: no operation mixes devices, nothing crosses between them but what is
meant to, and the attention's arguments suit a kernel of a GPU that is not the slow one.
"""
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import evaluate
import igp
import model as llm
from conftest import SIZES

CONFIG = llm.Config("qwen3", *list(SIZES.values())[:8], 1e-6, 5e3, None, False, ())


class Crossings(TorchDispatchMode):
    """Counts by shape what crosses between the CPU and "meta"; what comes back is ones.

    torch.tensor(list, device=...) is not seen, nor is inference mode, hence `__wrapped__` below.
    """

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        devices = {x.device.type for x in tensors if x.ndim}
        name = function._schema.name
        device = str(kwargs.get("device"))
        if name == "aten::_local_scalar_dense" and args[0].is_meta:
            self.found["back", ()] += 1
            return 1
        if name == "aten::_to_copy" and args[0].is_cpu and device == "meta":
            self.found["there", args[0].shape] += 1
        if name == "aten::_to_copy" and args[0].is_meta and device == "cpu":
            self.found["back", args[0].shape] += 1
            return torch.ones(args[0].shape)
        assert len(devices) < 2 or "index" in name, f"{name} of {devices}"  # indices may be outside
        return function(*args, **kwargs)


@pytest.fixture(params=[torch.bfloat16, torch.float32])
def model(request):
    with torch.device("meta"):
        return llm.Transformer(CONFIG).to(request.param).requires_grad_(False)


@pytest.fixture
def flash(model, monkeypatch):
    """Of every attention: may it share K and V, as on a GPU only bf16 without a mask may?"""
    found, real = [], F.scaled_dot_product_attention

    def attention(q, k, v, attend, **options):
        found.append(attend is None and v.dtype == torch.bfloat16)
        assert k.shape == v.shape and k.shape[1] == (2 if found[-1] else 6)
        return real(q, k, v, attend, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
    return found


def test_a_training_step(model, flash):
    with Crossings() as moved:
        z = torch.full((3, model.B), 0.5)
        igp.lm_gradient(model, [[1, 2, 3, 4], [5, 6, 7], [8, 9]], z, 2)
    assert moved.found == {("there", (2, 4)): 1, ("there", (1, 2)): 1,  # ids
                           ("there", (2, 6)): 1, ("there", (1, 6)): 1,  # z
                           ("back", (2, 6)): 1, ("back", (1, 6)): 1, ("back", ()): 1}
    assert len(flash) == 6


@pytest.mark.parametrize("choices", [1, 2])
def test_an_evaluation(model, flash, choices):
    groups = [([1, 2], [[3, 4], [5]][:choices])] * 2
    z = torch.ones(2, model.B, dtype=torch.bool)
    with Crossings() as moved:
        evaluate.loglikelihoods.__wrapped__(model, groups, z)
    assert moved.found == {("there", (2, 3, 3)): 1, ("there", (1, 6)): 1,
                           ("back", (2 + 2 * choices,)): 1}
    assert len(flash) == 3


def test_a_generation(model, flash):
    with Crossings() as moved:
        cache = model.new_cache(1, 6, torch.ones(model.B, dtype=torch.bool))
        assert list(llm.generate.__wrapped__(model, [1, 2, 3], cache)) == [1, 1, 1]
    assert moved.found == {("there", (1, 6)): 4, ("back", ()): 3}
    assert len(flash) == 9
