"""Writes lightrft-collectives/tests/data/mesh.json: what torch's DeviceMesh says of some meshes, seen from every rank.

    python tools/make_mesh_vectors.py

Needs torch (made with 2.13). No process group is started: torch's fake backend answers for every rank in turn.
"""

import json
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

# Sizes and names; slices, in the mesh's order; what is flattened, in the mesh's order; what is cut again.
MESHES = [
    {"axes": [["dp", 6]], "slices": [["dp"]], "flatten": [], "unflatten": ["dp", [["a", 2], ["b", 3]]]},
    {"axes": [["dp", 2], ["sp", 4]], "slices": [["dp"], ["sp"]], "flatten": ["dp", "sp"],
     "unflatten": ["sp", [["a", 2], ["b", 2]]]},
    {"axes": [["replicate", 1], ["shard", 4]], "slices": [["replicate"], ["shard"]],
     "flatten": ["replicate", "shard"], "unflatten": ["shard", [["a", 4], ["b", 1]]]},
    {"axes": [["pp", 2], ["dp", 3], ["tp", 2]], "slices": [["pp"], ["dp", "tp"], ["pp", "tp"], ["pp", "dp"]],
     "flatten": ["pp", "tp"], "unflatten": ["dp", [["a", 3], ["b", 1]]]},
    {"axes": [["pp", 2], ["dp", 2], ["cp", 2], ["tp", 2]],
     "slices": [["pp", "cp"], ["dp", "cp", "tp"], ["cp"], ["dp", "tp"]], "flatten": ["dp", "cp"],
     "unflatten": ["pp", [["a", 1], ["b", 2]]]},
]


def seen_from(rank: int, case: dict) -> dict:
    names, sizes = zip(*case["axes"])
    world = 1
    for size in sizes:
        world *= size
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    mesh = init_device_mesh("cpu", sizes, mesh_dim_names=names)
    seen = {
        "coordinates": list(mesh.get_coordinate()),
        "lines": [dist.get_process_group_ranks(mesh.get_group(name)) for name in names],
        "slices": [mesh[tuple(axes)].mesh.tolist() for axes in case["slices"]],
    }
    if case["flatten"]:
        flat = mesh[tuple(case["flatten"])]._flatten("flat")
        seen["flatten"] = flat.mesh.tolist()
    axis, parts = case["unflatten"]
    part_names, part_sizes = zip(*parts)
    cut = mesh._unflatten(axis, part_sizes, part_names)
    seen["unflatten"] = [dist.get_process_group_ranks(cut.get_group(name)) for name in part_names]
    dist.destroy_process_group()
    return seen


def main() -> None:
    cases = []
    for case in MESHES:
        world = 1
        for _, size in case["axes"]:
            world *= size
        cases.append({**case, "ranks": [seen_from(rank, case) for rank in range(world)]})
    path = Path(__file__).parent.parent / "lightrft-collectives/tests/data/mesh.json"
    path.write_text(json.dumps({"torch": torch.__version__, "meshes": cases}, separators=(",", ":")) + "\n")
    print(f"{len(cases)} meshes, {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
