"""Each name of torch that minids/parallel/_torch_private.py uses exists; a torch upgrade without one fails by name."""

import inspect
import re
from pkgutil import resolve_name

import pytest
import torch
import torch.distributed as dist
from documents import ROOT
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage

from minids.parallel import _torch_private as private
from minids.parallel.launch import launch

NAMES = [
    "torch._subclasses.fake_tensor:FakeTensorMode",
    "torch.utils._python_dispatch:TorchDispatchMode",
    "torch.ops:aten._local_scalar_dense.default",
    "torch.ops:aten._grouped_mm.default",
    "torch:UntypedStorage._cdata",
    "torch:_foreach_mul_",
    "torch.distributed.device_mesh:DeviceMesh._flatten",
    "torch.distributed.fsdp:fully_shard.state",
    "torch.distributed:distributed_c10d._get_default_store",
    "torch.testing._internal.distributed.fake_pg:FakeStore",
    "torch.distributed.tensor.debug:_clear_sharding_prop_cache",
    "torch.distributed.pipelining.schedules:_Action.from_str",
    "torch.distributed.pipelining.schedules:_PipelineScheduleRuntime",
]
OVERRIDDEN = {  # undocumented methods of the public PipelineStage, which parallel/pipeline.py overrides
    "forward_one_chunk": ["fwd_chunk_id", "args", "kwargs", "save_forward_output"],
    "backward_one_chunk": ["bwd_chunk_id", "loss", "full_backward", "last_backward"],
    "backward_weight_one_chunk": ["bwd_chunk_id", "last_backward"],
}
READ_BY_TORCH = [  # attributes that torch's class reads, and this package sets or takes from
    ("torch.distributed.pipelining.schedules:_PipelineScheduleRuntime", "pipeline_order_with_comms"),
    ("torch.distributed.pipelining.stage:_PipelineStageBase", "stage_index_to_group_rank"),
    ("torch.distributed.pipelining.stage:_PipelineStageBase", "backward_state"),
]
FSDP = {  # attributes of objects that exist in a process group only
    "state": ["_fsdp_param_groups", "_is_root", "_root_post_backward_final_callback"],
    "parameter group": ["post_backward"],
}


def torch_has(name):
    try:
        return resolve_name(name) is not None
    except (ImportError, AttributeError):
        return False


@pytest.mark.parametrize("name", NAMES)
def test_private_name_exists(name):
    assert torch_has(name), f"torch {torch.__version__} has no {name.replace(':', '.')}"


def test_missing_name_is_noticed():
    assert not torch_has("torch.distributed.fsdp:fully_shard.no_such_name") and not torch_has("torch.no_such_module:x")


@pytest.mark.parametrize("name", OVERRIDDEN)
def test_overridden_stage_method_keeps_its_signature(name):
    method = getattr(PipelineStage, name, None)
    assert method is not None, f"torch {torch.__version__} has no PipelineStage.{name}"
    assert list(inspect.signature(method).parameters)[1:] == OVERRIDDEN[name]


@pytest.mark.parametrize("owner, name", READ_BY_TORCH)
def test_attribute_is_read_by_torch(owner, name):
    source = inspect.getsource(resolve_name(owner))
    assert f"self.{name}" in source, f"torch {torch.__version__} has no {owner.replace(':', '.')}.{name}"


def test_attributes_of_fsdp_exist():
    def work(rank):
        linear = nn.Linear(2, 2)
        fully_shard(linear, mesh=init_device_mesh("cpu", (1,)))
        linear(torch.ones(1, 2)).sum().backward()
        state = fully_shard.state(linear)
        groups = getattr(state, "_fsdp_param_groups", [None])
        objects = zip(FSDP, (state, groups[0]), strict=True)
        return [f"{kind}: {name}" for kind, found in objects for name in FSDP[kind] if not hasattr(found, name)]

    assert launch(work, 1) == [[]], f"missing in torch {torch.__version__}"


def test_flattened_mesh_and_default_store_work():
    def work(rank):
        mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "ep"))
        flat = private.flatten_mesh(mesh["dp", "ep"], "data")
        private.default_store().set(f"rank {rank}", "here")
        dist.barrier()
        return flat.mesh_dim_names, flat.size(), [private.default_store().check([f"rank {r}"]) for r in (0, 1)]

    assert launch(work, 2) == [(("data",), 2, [True, True])] * 2


def test_storage_id_tells_fake_storages_apart():
    with private.FakeTensorMode():
        one, other = torch.empty(3), torch.empty(3)
        view = one.view(3, 1)
        first, second, third = (private.storage_id(tensor.untyped_storage()) for tensor in (one, view, other))
    assert first == second != third


def test_scale_in_place_scales_all_tensors():
    tensors = [torch.ones(2), torch.full((1, 3), 2.0)]
    private.scale_in_place(tensors, 0.5)
    assert [tensor.unique().item() for tensor in tensors] == [0.5, 1.0]


PRIVATE = re.compile(
    r"\btorch\.(\w+\.)*_\w+|\.distributed_c10d\b|\b_PipelineScheduleRuntime\b|\b_Action\b|\._(flatten|cdata|fsdp)"
)


def test_other_modules_use_no_private_name_of_torch():
    sources = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "minids/parallel").glob("*.py")}
    assert PRIVATE.search(sources.pop("_torch_private.py"))
    assert {name: found[0] for name, source in sources.items() if (found := PRIVATE.search(source))} == {}
