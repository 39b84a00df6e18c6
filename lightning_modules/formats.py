"""A subset in the forms of other libraries: a FAISS index, an ONNX graph, modules of sentence-transformers."""

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import safetensors.torch
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

OPSET = 17  # of ONNX
LEVELS = "levels.py"  # the module that sentence-transformers lacks


class Map(NamedTuple):
    """What becomes of features, shape (n, D): chosen or rotated, taken to levels, and brought back to length 1."""

    weight: Tensor  # kept are features @ weight' + bias; float32, shape (k, D)
    bias: Tensor  # shape (k,)
    low: Tensor | None  # the lowest level of each, shape (k,); None where there are no levels
    step: Tensor | None  # between levels
    bits: int
    similarity: str | None  # by which kept vectors are compared; None where a probe sees them


def kept_map(tensors: dict[str, Tensor], width: int, bits: int, similarity: str | None) -> Map:
    """Return the map of what `subset.safetensors` holds, from D = `width` neurons."""
    if "indices" in tensors:
        weight = torch.eye(width)[tensors["indices"]]
        bias = torch.zeros(len(weight))
    else:
        weight = tensors["basis"].t().contiguous()
        bias = -(weight.double() @ tensors["mean"].double()).float()
    return Map(weight, bias, tensors.get("low"), tensors.get("step"), bits, similarity)


def installed(library: str, user: str) -> ModuleType:
    """Import an optional library; say how to install it where it is not there, and who needs it."""
    try:
        return importlib.import_module(library)
    except ImportError as error:
        raise MisconfigurationException(
            f"{user} needs {library}, which is not installed; `pip install 'diffused-redundancy[{library}]'` does it."
        ) from error


def faiss_factory(kept: Map) -> str:
    """Return what FAISS calls a store like ours after the transform: that much of it can be had from `index_factory`.

    Levels are scalar quantisers of 8 and 4 bits, and in 2 and 1 bits product quantisers of single numbers, which need
    no training as their centroids are the levels.
    """
    stores = {32: "Flat", 8: "SQ8", 4: "SQ4"}
    return stores.get(kept.bits, f"PQ{len(kept.bias)}x{kept.bits}")


def _faiss(folder: Path, kept: Map) -> None:
    """Write an empty index that is trained with the subset's levels, and its transform alone."""
    faiss = importlib.import_module("faiss")
    size, width = kept.weight.shape
    transform = faiss.LinearTransform(width, size, True)
    faiss.copy_array_to_vector(kept.weight.numpy().ravel(), transform.A)
    faiss.copy_array_to_vector(kept.bias.numpy(), transform.b)
    transform.is_trained = True
    metric = faiss.METRIC_INNER_PRODUCT if kept.similarity in ("cosine", "dot") else faiss.METRIC_L2
    store = faiss.index_factory(size, faiss_factory(kept), metric)
    if kept.low is not None and kept.step is not None:
        if kept.bits in (8, 4):  # cells begin half a step before their level
            trained, values = store.sq.trained, torch.cat([kept.low - kept.step / 2, kept.step * (2**kept.bits - 1)])
        else:
            codes = torch.arange(2**kept.bits)
            trained, values = store.pq.centroids, kept.low.unsqueeze(1) + kept.step.unsqueeze(1) * codes
        faiss.copy_array_to_vector(values.numpy().ravel(), trained)
        store.is_trained = True
    index = faiss.IndexPreTransform(store)
    if kept.similarity == "cosine" and kept.low is None:
        index.prepend_transform(faiss.NormalizationTransform(size))
    index.prepend_transform(transform)
    faiss.write_VectorTransform(transform, str(folder / "transform.faiss"))
    faiss.write_index(index, str(folder / "index.faiss"))


def _faiss_use(kept: Map) -> str:
    searched = "index = faiss.read_index('index.faiss'); index.add(features); found = index.search(features, {})  # {}"
    if kept.similarity != "cosine" or kept.low is None:
        return searched.format(10, faiss_factory(kept))
    why = "inner products, as FAISS does not divide by the length of levels: rank them again by cosine"
    return searched.format(40, f"{faiss_factory(kept)}; {why}")


def _onnx(folder: Path, kept: Map) -> None:
    """Write a graph from `features`, float32 of shape (n, D), to `kept`, shape (n, k)."""
    onnx = importlib.import_module("onnx")
    size, width = kept.weight.shape
    values = {"weight": kept.weight, "bias": kept.bias}
    steps: list[tuple[str, list[str], dict[str, Any]]] = [("Gemm", ["features", "weight", "bias"], {"transB": 1})]
    if kept.low is not None and kept.step is not None:
        values |= {"low": kept.low, "step": kept.step, "least": torch.zeros(())}
        values["most"] = torch.tensor(2.0**kept.bits - 1)
        steps += [("Sub", ["", "low"], {}), ("Div", ["", "step"], {}), ("Round", [""], {})]
        steps += [("Clip", ["", "least", "most"], {}), ("Mul", ["", "step"], {}), ("Add", ["", "low"], {})]
    if kept.similarity == "cosine":
        steps += [("LpNormalization", [""], {"axis": 1, "p": 2})]
    nodes, last = [], ""
    for place, (kind, inputs, attributes) in enumerate(steps):
        out = "kept" if place == len(steps) - 1 else f"{kind}_{place}"
        nodes.append(onnx.helper.make_node(kind, [name or last for name in inputs], [out], **attributes))
        last = out
    number = onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(
        nodes,
        "subset",
        [onnx.helper.make_tensor_value_info("features", number, ["n", width])],
        [onnx.helper.make_tensor_value_info("kept", number, ["n", size])],
        [onnx.numpy_helper.from_array(value.numpy(), name) for name, value in values.items()],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", OPSET)], ir_version=8)
    onnx.checker.check_model(model)
    onnx.save(model, folder / "kept.onnx")


def _sentence_transformers(folder: Path, kept: Map) -> None:
    """Write the folder of a model whose modules are to follow those of an embedding model."""
    folder = folder / "sentence_transformers"
    modules = [("Dense", "sentence_transformers.models.Dense")]
    modules += [("Levels", "levels.Levels")] * (kept.low is not None)
    modules += [("Normalize", "sentence_transformers.models.Normalize")] * (kept.similarity == "cosine")
    listed = [
        {"idx": place, "name": str(place), "path": f"{place}_{name}", "type": kind}
        for place, (name, kind) in enumerate(modules)
    ]
    for module in listed:
        (folder / str(module["path"])).mkdir(parents=True, exist_ok=True)
    size, width = kept.weight.shape
    dense: dict[str, Any] = {"in_features": width, "out_features": size, "bias": True}
    dense["activation_function"] = "torch.nn.modules.linear.Identity"
    (folder / "0_Dense" / "config.json").write_text(json.dumps(dense, indent=2))
    linear = {"linear.weight": kept.weight, "linear.bias": kept.bias}
    safetensors.torch.save_file(linear, folder / "0_Dense" / "model.safetensors")
    if kept.low is not None and kept.step is not None:
        levels = {"low": kept.low, "step": kept.step, "most": torch.tensor(2.0**kept.bits - 1)}
        safetensors.torch.save_file(levels, folder / "1_Levels" / "model.safetensors")
        (folder / LEVELS).write_bytes(Path(__file__).with_name(LEVELS).read_bytes())
    similarity = {"l2": "euclidean"}.get(str(kept.similarity), kept.similarity)
    settings = {"model_type": "SentenceTransformer", "similarity_fn_name": similarity}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(settings, indent=2))
    (folder / "modules.json").write_text(json.dumps(listed, indent=2))


class Format(NamedTuple):
    """A form that `export` writes beside its own files."""

    write: Callable[[Path, Map], None]
    files: tuple[str, ...]  # that a reader opens
    library: str | None  # that writes it
    use: Callable[[Map], str]  # what the card says of it: Python, from NumPy `features`


FORMATS = {
    "faiss": Format(_faiss, ("index.faiss", "transform.faiss"), "faiss", _faiss_use),
    "onnx": Format(
        _onnx,
        ("kept.onnx",),
        "onnx",
        lambda _: "kept = onnxruntime.InferenceSession('kept.onnx').run(['kept'], {'features': features})[0]",
    ),
    "sentence_transformers": Format(
        _sentence_transformers,
        ("sentence_transformers/modules.json",),
        None,
        lambda kept: (
            f"model = SentenceTransformer('sentence_transformers'"
            f"{'' if kept.low is None else ', trust_remote_code=True'}); "
            f"kept = model({{'sentence_embedding': torch.from_numpy(features)}})['sentence_embedding']"
        ),
    ),
}
"""By name. A new one is a function above and an entry here."""
