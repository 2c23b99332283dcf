"""Take a trained model elsewhere: `torch.export` and ONNX, with a dynamic batch and a dynamic size.

    toco onnx runs/<run> model.onnx

The graph has one input, `images` (B 3 H W, RGB in [0, 1], H and W multiples of the patch), and three outputs: `scores`
(B K, probability of each class), `cam` (B K H W in [0, 1), one scale, not mirrored, each class on its own) and
`segmentation` (B C H W, logits, background first). Labels from scores, several scales, attention, PAR and the CRF stay
outside.
"""

import importlib
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from toco_core.cam import class_activation, normalise_cam
from toco_core.errors import ToCoError
from toco_core.machine.writing import whole_file, writing
from toco_core.model import ToCo

INPUT, OUTPUTS = "images", ("scores", "cam", "segmentation")
TOLERANCE = 1e-4
"""Largest difference of an output of the written file, as onnxruntime computes it, relative to the largest value."""


class Portable(nn.Module):
    """The network from image to maps, without anything that depends on a value."""

    def __init__(self, model: ToCo):
        super().__init__()
        self.model = model.eval()
        self.eval()

    def forward(
        self, images: Float[Tensor, "B 3 H W"]
    ) -> tuple[Float[Tensor, "B K"], Float[Tensor, "B K H W"], Float[Tensor, "B C H W"]]:
        """Return scores, CAM and segmentation logits of images in [0, 1]."""
        size = images.shape[-2:]
        found = self.model(self.model.normalise(images))
        cam = class_activation(found.tokens.patch_map, self.model.classifier.weight)
        cam = F.interpolate(cam, size=size, mode="bilinear", align_corners=False)
        segmentation = F.interpolate(found.seg_logits, size=size, mode="bilinear", align_corners=False)
        cam = normalise_cam(F.relu(cam).flatten(0, 1)).unflatten(0, cam.shape[:2])
        return found.class_logits.sigmoid(), cam, segmentation


def exported(model: ToCo) -> torch.export.ExportedProgram:
    """Trace the model by `torch.export`, for every batch and every size in whole patches from 2 x 2 on."""
    images, shapes = _traced_with(model)
    with torch.no_grad():
        return torch.export.export(Portable(model), (images,), dynamic_shapes=(shapes,), strict=False)


def write_onnx(model: ToCo, path: str | Path) -> Path:
    """Write the model as an ONNX file and compare it with this one by onnxruntime, at other sizes than it was traced.

    Raises ToCoError where a package is missing or PyTorch too old, where the file cannot be written, and where an
    output differs by more than TOLERANCE: a file of before stays.
    """
    for name in ("onnx", "onnxscript", "onnxruntime"):
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ToCoError(f"ONNX needs the package {name}: pip install 'toco_core[onnx]'") from error
    path = Path(path)
    if not path.parent.is_dir():
        raise ToCoError(f"path = {str(path)!r} is in no folder that exists")
    images, shapes = _traced_with(model)
    with writing(path), whole_file(path) as file, torch.no_grad():
        try:
            program = torch.onnx.export(
                Portable(model), (images,), input_names=[INPUT], output_names=list(OUTPUTS), dynamo=True,
                dynamic_shapes=(shapes,), verbose=False,
            )  # fmt: skip
        except torch.onnx.OnnxExporterError as error:  # 2.6 knows no bicubic resizing to a size that is not fixed
            raise ToCoError(
                f"PyTorch {torch.__version__} cannot write this network as ONNX: take a newer one"
            ) from error
        data = program.model_proto.SerializeToString()
        worst = onnx_difference(model, data)
        if worst > TOLERANCE:
            raise ToCoError(f"the ONNX file's outputs differ by {worst:.1e} from the model's: {TOLERANCE} is allowed")
        file.write(data)
    return path


@torch.no_grad()
def onnx_difference(model: ToCo, file: bytes) -> float:
    """Return the largest difference between the file's outputs and the model's, relative to each output's largest."""
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    portable, worst = Portable(model), 0.0
    ph, pw = model.patch_size
    generator = torch.Generator().manual_seed(0)
    for batch, height, width in ((1, 5 * ph, 7 * pw), (3, 9 * ph, 4 * pw)):
        images = torch.rand(batch, 3, height, width, generator=generator)
        wanted = [output.cpu() for output in portable(images.to(model.classifier.weight.device))]
        found = session.run(list(OUTPUTS), {INPUT: images.numpy()})
        for ours, theirs in zip(wanted, found, strict=True):
            if ours.shape != theirs.shape:
                return float("inf")
            worst = max(worst, float((ours - torch.from_numpy(theirs)).abs().max() / ours.abs().max()))
    return worst


def _traced_with(model: ToCo) -> tuple[Tensor, dict]:
    """Images and which of their axes are dynamic."""
    ph, pw = model.patch_size
    rows, columns = (torch.export.Dim(name, min=2, max=1024) for name in ("rows", "columns"))
    shapes = {0: torch.export.Dim("batch", min=1, max=1024), 2: ph * rows, 3: pw * columns}
    weight = model.classifier.weight
    return torch.rand(2, 3, 3 * ph, 6 * pw, dtype=weight.dtype, device=weight.device), shapes
