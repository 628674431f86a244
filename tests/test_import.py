"""`import recattn` needs PyTorch and NumPy, and nothing else."""

from __future__ import annotations

import subprocess
import sys
import textwrap

PEERS = ("deepctr_torch", "fuxictr", "recbole", "torch_rechub", "tzrec", "torchrec", "fbgemm_gpu")
OPTIONAL = ("triton", *PEERS, "matplotlib", "rich", "sklearn")


def run_fresh(code: str) -> str:
    """What `code` prints in a process of its own."""
    script = f"OPTIONAL = {OPTIONAL!r}\n" + textwrap.dedent(code)
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_nothing_optional_is_imported() -> None:
    # What PyTorch imports by itself, if any of it, is not ours to answer for.
    printed = run_fresh(
        """
        import sys
        import numpy, torch
        before = set(sys.modules)
        import recattn
        print([name for name in set(sys.modules) - before if name.split(".")[0] in OPTIONAL])
        """
    )
    assert printed == "[]"


def test_the_cpu_path_runs_where_nothing_optional_can_be_imported() -> None:
    printed = run_fresh(
        """
        import sys


        class Refuse:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] in OPTIONAL:
                    raise ModuleNotFoundError(f"No module named {name!r}", name=name)
                return None


        sys.meta_path.insert(0, Refuse())
        for name in OPTIONAL:
            try:
                __import__(name)
            except ModuleNotFoundError:
                continue
            raise SystemExit(f"{name} was imported")

        import torch
        import recattn

        layer = recattn.nn.ActivationUnit(4, (8, 4))
        query = torch.randn(3, 4, requires_grad=True)
        keys = torch.randn(3, 5, 4, requires_grad=True)
        out = layer(query, keys, lengths=torch.tensor([2, 0, 5]))
        out.square().sum().backward()
        # The last, that of the bias of the scores, is zero: softmax does not see it.
        gradients = [query.grad, keys.grad, *(parameter.grad for parameter in layer.parameters())]
        assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
        assert len(recattn.fuse(layer)) == 0 and recattn.unfuse(layer) is layer
        print(tuple(out.shape), out[1].any().item(), all(gradient.any() for gradient in gradients[:-1]))
        """
    )
    assert printed == "(3, 4) False True"
