"""The formats of an exported student: each is written, and run again from its file."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import io
import json
import logging
import re
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mdistiller.registry import InputError, RunError

from .student import Deployable, Student

OPSET = 18  # the operators for which torch's exporter is written; runtimes since 2023 have them
IMAGE, LOGITS, BATCH = "image", "logits", "batch"  # names in the files
TOLERANCE = 1e-4  # largest difference from the network's logits, relative to the largest of these


@dataclass(frozen=True)
class Format:
    """A kind of file.

    Args:
        file: its name.
        about: what it is, for help and card.
        packages: that it needs, by import name.
        extra: the extra of setup.py that has these packages.
        write: ``write(student, network, calibration)`` gives the file's bytes.
        read: ``read(path, student)`` gives a function from images to logits ``(B, K)``.
        is_exact: the file's logits are the network's, up to :data:`TOLERANCE`.
        has_input: the file transforms the images itself, so it may take uint8.
    """

    file: str
    about: str
    packages: tuple[str, ...]
    extra: str
    write: Callable[[Student, Deployable, Tensor | None], bytes]
    read: Callable[[Path, Student], Callable[[Tensor], Tensor]]
    is_exact: bool = True
    has_input: bool = True


def check_installed(names: Iterable[str]) -> None:
    """
    Raises:
        InputError: a package that one of the formats needs is missing; says what to install.
    """
    for name in names:
        form = FORMATS[name]
        missing = [package for package in form.packages if importlib.util.find_spec(package) is None]
        if missing:
            raise InputError(
                f"{form.file} needs {', '.join(missing)}: pip install {' '.join(missing)}, or in a checkout pip "
                f'install -e ".[{form.extra}]"; or choose other files by --formats'
            )


class Runner(nn.Module):
    """A file as a network of the data set's normalised images ``(B, 3, H, W)``."""

    def __init__(self, run: Callable[[Tensor], Tensor], student: Student, takes_bytes: bool) -> None:
        super().__init__()
        vars(self)["run"] = run  # no part of this network, since a program of torch.export has no modes
        self.takes_bytes = takes_bytes
        self.mean, self.std = (torch.tensor(values).view(1, -1, 1, 1) for values in student.normalisation)

    @torch.no_grad()
    def forward(self, image: Tensor) -> Tensor:
        if self.takes_bytes:
            image = ((image * self.std + self.mean) * 255).round().clamp(0, 255).to(torch.uint8)
        return self.run(image.contiguous())


@contextlib.contextmanager
def _quiet(what: str) -> Iterator[None]:
    """Keep torch's and onnx's notices from the console; an error names the format.

    Raises:
        RunError: in place of any error.
    """
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise RunError(f"{what} cannot be made of this network: {reason}; choose other files by --formats") from error
    finally:
        logging.disable(level)


def _example(student: Student, network: Deployable) -> Tensor:
    """A batch of two: one image would be taken for the only size of batch."""
    kind = torch.uint8 if network.takes_bytes else torch.float32
    return torch.zeros(2, 3, student.side, student.side, dtype=kind)


# safetensors


def _write_safetensors(student: Student, network: Deployable, calibration: Tensor | None) -> bytes:
    from safetensors.torch import save

    state = {key: value.detach().clone().contiguous() for key, value in student.network.state_dict().items()}
    return save(state, student.metadata(own=True))


def _read_safetensors(path: Path, student: Student) -> Callable[[Tensor], Tensor]:
    from safetensors.torch import load_file

    network = copy.deepcopy(student.network)
    network.load_state_dict(load_file(path))
    return Deployable(network, student.input).eval()


# torch.export


def _write_program(student: Student, network: Deployable, calibration: Tensor | None) -> bytes:
    sizes = {IMAGE: {0: torch.export.Dim(BATCH)}}
    buffer = io.BytesIO()
    with _quiet("student.pt2"), torch.no_grad():
        program = torch.export.export(network, (_example(student, network),), dynamic_shapes=sizes, strict=False)
        torch.export.save(program, buffer, extra_files={"metadata.json": json.dumps(student.metadata())})
    return buffer.getvalue()


def _read_program(path: Path, student: Student) -> Callable[[Tensor], Tensor]:
    with _quiet(path.name):
        return torch.export.load(path).module()


# ONNX


def _write_onnx(student: Student, network: Deployable, calibration: Tensor | None) -> bytes:
    with _quiet("student.onnx"), torch.no_grad():
        model = torch.onnx.export(
            network,
            (_example(student, network),),
            input_names=[IMAGE],
            output_names=[LOGITS],
            dynamic_shapes={IMAGE: {0: torch.export.Dim(BATCH)}},
            opset_version=OPSET,
            external_data=False,
            dynamo=True,
            verbose=False,
        ).model_proto
        for node in (node for graph in (model.graph, *model.functions) for node in graph.node):
            del node.metadata_props[:]  # stack traces, with the paths of this machine
        _name_batch(model.graph)
        return _with_metadata(model, student)


def _name_batch(graph: Any) -> None:
    """Call the free dimension ``batch``; the exporter may have called it ``s0``."""
    given = graph.input[0].type.tensor_type.shape.dim[0].dim_param
    for value in (*graph.input, *graph.output, *graph.value_info):
        for size in (size for size in value.type.tensor_type.shape.dim if size.dim_param):
            size.dim_param = re.sub(rf"\b{given}\b", BATCH, size.dim_param)


def _with_metadata(model: Any, student: Student) -> bytes:
    import onnx

    onnx.helper.set_model_props(model, student.metadata())
    return model.SerializeToString()


def _read_onnx(path: Path, student: Student) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda image: torch.from_numpy(session.run([LOGITS], {IMAGE: image.numpy()})[0])


def _write_int8(student: Student, network: Deployable, calibration: Tensor | None) -> bytes:
    """Weights and activations of 8 bits, weights with a scale for each output channel."""
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Images(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = iter(calibration.split(20))

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self.batches, None)
            return None if batch is None else {IMAGE: batch.numpy()}

    with tempfile.TemporaryDirectory() as folder, _quiet("student.int8.onnx"):
        plain, prepared, whole = (str(Path(folder) / f"{name}.onnx") for name in ("plain", "prepared", "int8"))
        Path(plain).write_bytes(_write_onnx(student, network, None))
        quant_pre_process(plain, prepared, skip_symbolic_shape=True)
        quantize_static(
            prepared,
            whole,
            Images(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QInt8,
            weight_type=QuantType.QInt8,
        )
        return _with_metadata(onnx.load(whole), student)


_ONNX = ("onnx", "onnxscript", "onnxruntime")
FORMATS = {
    "safetensors": Format(
        "student.safetensors",
        "the weights under the names of the network's own library",
        ("safetensors",),
        "models",
        _write_safetensors,
        _read_safetensors,
        has_input=False,
    ),
    "onnx": Format("student.onnx", f"ONNX, opset {OPSET}, any batch", _ONNX, "export", _write_onnx, _read_onnx),
    "pt2": Format("student.pt2", "a torch.export program, any batch", (), "", _write_program, _read_program),
    "int8": Format(
        "student.int8.onnx",
        "ONNX with weights and activations of 8 bits",
        _ONNX,
        "export",
        _write_int8,
        _read_onnx,
        is_exact=False,
    ),
}
