"""Lets PyPI's torchvision load beside a CPU build of torch; only deploy/setup installs it.

PyPI builds torchvision for CUDA, so its extension does not load beside torch's CPU build, and the
import fails with "operator torchvision::nms does not exist". Transformers and vLLM only use its
resize functions, which need no extension, so it is enough to declare the two schemas that
torchvision looks up. That has to happen before torchvision's first import, in every process, the
engine's child and Ray's workers too: deploy/setup copies this file into the virtual environment
with a .pth file that imports it at start-up. It costs nothing there: torch is only imported when
torchvision is.

Where torchvision's CPU build is to be had, deploy/setup takes that one and leaves this file out.
"""

import sys
from importlib.machinery import ModuleSpec, PathFinder

_declared: list[object] = []  # a Library takes its schemas along when it is collected


def _declare() -> None:
    import torch

    if not _declared:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _declared.append(library)


class _Finder:
    @staticmethod
    def find_spec(fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if fullname != "torchvision":
            return None
        spec = PathFinder.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def declare_and_run(module: object) -> None:
            _declare()
            run(module)

        spec.loader.exec_module = declare_and_run
        return spec


sys.meta_path.insert(0, _Finder)
