"""The aliasing runs in processes of its own, with stand-ins for the packages; the last class takes the real ones."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from coupfast.models import robustbench_import
from coupfast.models.dm_wide_resnet import DMWideResNet
from coupfast.models.wide_resnet import WideResNet

FILE = Path(robustbench_import.__file__)

ROBUSTBENCH = {
    "robustbench/__init__.py": "from .eval import benchmark\n",
    "robustbench/eval.py": """
        import pkg_resources
        from autoattack import AutoAttack
        from autoattack.state import EvaluationState
        def benchmark(log_path=None, state_path=None):
            adversary = AutoAttack("model", norm="L2", eps=0.5, version="standard", device="cpu", log_path=log_path)
            return adversary.run_standard_evaluation("x", "y", bs=7, state_path=state_path)
    """,
}
PYAUTOATTACK = {
    "pyautoattack/__init__.py": """
        class AutoAttack:
            def __init__(self, model, *, attacks=None, device="cpu", eps=0.3, norm="Linf", seed=None,
                         version="standard"):
                self.options = (model, norm, eps, seed, version, device)
            def run_standard_evaluation(self, x, y, /, *, batch_size=250, state_path=None):
                return (self.options, x, y, batch_size), "labels"
    """,
    "pyautoattack/state.py": "class EvaluationState: pass\n",
}
AUTOATTACK = {
    "autoattack/__init__.py": """
        class AutoAttack:
            def __init__(self, *args, **kwargs): pass
            def run_standard_evaluation(self, *args, **kwargs): return "the original"
    """,
    "autoattack/state.py": "class EvaluationState: pass\n",
}
TORCHVISION = {"torchvision/__init__.py": ""}
PKG_RESOURCES = {"pkg_resources.py": 'import warnings; warnings.warn("pkg_resources is deprecated as an API", UserWarning)\n'}


@pytest.fixture
def run(tmp_path):
    """Runs code where the given stand-ins are installed and none of the packages that they stand for."""

    def run(code, *packages):
        for package in packages:
            for name, source in package.items():
                (tmp_path / name).parent.mkdir(exist_ok=True)
                (tmp_path / name).write_text(textwrap.dedent(source))
        # The file by its path: no package, no torch; -S: no site-packages, so only the stand-ins are there.
        prelude = f"""
            import importlib.util, sys
            sys.path.insert(0, {str(tmp_path)!r})
            spec = importlib.util.spec_from_file_location("robustbench_import", {str(FILE)!r})
            robustbench_import = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(robustbench_import)
        """
        script = textwrap.dedent(prelude) + textwrap.dedent(code)
        return subprocess.run(
            [sys.executable, "-S", "-I", "-W", "error", "-c", script], capture_output=True, text=True, timeout=60
        )

    return run


def printed(result):
    assert result.returncode == 0, result.stderr
    return result.stdout.strip().splitlines()


def test_pyautoattack_stands_in_with_the_original_signature(run):
    code = """
        robustbench = robustbench_import.import_robustbench()
        print(robustbench.benchmark())
        print(sorted(name for name in sys.modules if name.startswith("autoattack")))
        print(robustbench_import.import_robustbench() is robustbench)
    """
    lines = printed(run(code, ROBUSTBENCH, PYAUTOATTACK, TORCHVISION, PKG_RESOURCES))
    assert lines == ["(('model', 'L2', 0.5, None, 'standard', 'cpu'), 'x', 'y', 7)", "[]", "True"]


@pytest.mark.parametrize("option", ["log_path", "state_path"])
def test_what_pyautoattack_cannot_honour_is_refused(option, run):
    result = run(
        f"robustbench_import.import_robustbench().benchmark({option}='somewhere')",
        *(ROBUSTBENCH, PYAUTOATTACK, TORCHVISION, PKG_RESOURCES),
    )
    assert "ValueError" in result.stderr
    assert "somewhere" in result.stderr


def test_the_real_autoattack_is_preferred(run):
    code = "print(robustbench_import.import_robustbench().benchmark(), 'autoattack' in sys.modules)"
    lines = printed(run(code, ROBUSTBENCH, PYAUTOATTACK, AUTOATTACK, TORCHVISION, PKG_RESOURCES))
    assert lines == ["the original True"]


@pytest.mark.parametrize("loaded", [False, True])
def test_a_script_of_the_same_name_is_no_autoattack(run, loaded):
    script = {"autoattack.py": "print('a script')\n"}
    code = f"""
        if {loaded}: import autoattack
        print(robustbench_import.import_robustbench().benchmark()[1:], hasattr(sys.modules.get("autoattack"), "AutoAttack"))
        print("autoattack" in sys.modules)
    """
    lines = printed(run(code, ROBUSTBENCH, PYAUTOATTACK, script, TORCHVISION, PKG_RESOURCES))
    assert lines == ["a script"] * loaded + ["('x', 'y', 7) False", str(loaded)]


def test_an_alias_made_elsewhere_is_left_alone(run):
    code = """
        import pyautoattack, pyautoattack.state
        sys.modules["autoattack"], sys.modules["autoattack.state"] = pyautoattack, pyautoattack.state
        robustbench_import.import_robustbench()
        print(sys.modules["autoattack"] is pyautoattack)
    """
    assert printed(run(code, ROBUSTBENCH, PYAUTOATTACK, TORCHVISION, PKG_RESOURCES)) == ["True"]


@pytest.mark.parametrize(
    ("packages", "message"),
    [
        ([PYAUTOATTACK, TORCHVISION, PKG_RESOURCES], 'robustbench is not installed; install it with: pip install "cou'),
        ([ROBUSTBENCH, TORCHVISION, PKG_RESOURCES], "neither autoattack nor pyautoattack is installed"),
        ([ROBUSTBENCH, PYAUTOATTACK, PKG_RESOURCES], "robustbench needs torchvision"),
        ([ROBUSTBENCH, PYAUTOATTACK, TORCHVISION], '"setuptools<81"'),
    ],
    ids=["robustbench", "pyautoattack", "torchvision", "pkg_resources"],
)
def test_what_is_missing_is_named(packages, message, run):
    result = run("robustbench_import.import_robustbench()", *packages)
    assert result.returncode != 0
    assert message in result.stderr.splitlines()[-1]
    assert result.stderr.splitlines()[-1].startswith("ImportError: ")


def test_a_torchvision_for_another_torch_is_named(run):
    broken = {"torchvision/__init__.py": 'raise RuntimeError("operator torchvision::nms does not exist")'}
    result = run("robustbench_import.import_robustbench()", ROBUSTBENCH, PYAUTOATTACK, broken, PKG_RESOURCES)
    last = result.stderr.splitlines()[-1]
    assert last.startswith("ImportError: torchvision does not work with the installed torch (operator torchvision::nms")


def test_a_failed_import_can_be_tried_again(run):
    lacking = {"robustbench/__init__.py": "from . import enums\nimport timm\n", "robustbench/enums.py": ""}
    code = """
        for _ in range(2):
            try:
                robustbench_import.import_robustbench()
            except ImportError as error:
                print(error, [name for name in sys.modules if "robustbench" in name or "autoattack" in name])
    """
    first, second = printed(run(code, lacking, PYAUTOATTACK, TORCHVISION, PKG_RESOURCES))
    assert first == second
    assert "No module named 'timm'" in first


@pytest.fixture(scope="module")
def robustbench():
    try:
        return robustbench_import.import_robustbench()
    except ImportError as error:
        pytest.skip(f"RobustBench cannot be imported here: {error}")


class TestRealRobustBench:
    def test_nothing_is_left_behind(self, robustbench):
        module = sys.modules.get("autoattack")
        assert module is None or module.__spec__ is not None

    def test_zoo_models_can_be_built(self, robustbench):
        from robustbench.model_zoo import model_dicts
        from robustbench.model_zoo.enums import BenchmarkDataset, ThreatModel

        model = model_dicts[BenchmarkDataset.cifar_10][ThreatModel.Linf]["Standard"]["model"]().eval()
        assert sum(parameter.numel() for parameter in model.parameters()) == 36_479_194

    @pytest.mark.parametrize("family", ["wide_resnet", "dm_wide_resnet"])
    def test_its_weights_fit_ours(self, family, robustbench):
        from robustbench.model_zoo.architectures import dm_wide_resnet, wide_resnet

        if family == "wide_resnet":
            theirs, ours = wide_resnet.WideResNet(16, 10, 2), WideResNet(16, 2, 10)
        else:
            theirs = dm_wide_resnet.DMWideResNet(10, 16, 2, activation_fn=dm_wide_resnet.Swish)
            ours = DMWideResNet(16, 2, 10, "silu")
        generator = torch.Generator().manual_seed(0)
        for name, tensor in [*theirs.named_parameters(), *theirs.named_buffers()]:
            if tensor.ndim == 1 and not name.endswith("num_batches_tracked"):  # freshly made, these are all 0 or 1
                tensor.data.uniform_(0.5, 1.5, generator=generator)
        assert list(theirs.state_dict()) == list(ours.state_dict())
        ours.load_state_dict(theirs.state_dict())
        x = torch.rand(2, 3, 32, 32, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            expected, found = theirs.double().eval()(x), ours.double().eval()(x)
        # 20 layers that add the same terms, some in another order: a few roundings of the largest logit each.
        tol = 20 * 4 * torch.finfo(torch.float64).eps * expected.abs().max().item()
        torch.testing.assert_close(found, expected, rtol=0, atol=tol)

    def test_benchmark_runs(self, robustbench, monkeypatch):
        if not hasattr(robustbench, "benchmark"):
            pytest.skip("this RobustBench has its benchmark commented out, as 1.1.1 has")
        from robustbench import data
        from robustbench.model_zoo.enums import BenchmarkDataset

        generator = torch.Generator().manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, 10)).eval()
        torch.nn.init.normal_(model[1].weight, generator=generator)
        x = torch.rand(4, 3, 8, 8, generator=generator)
        with torch.no_grad():
            y = model(x).argmax(1)
        loaders = data._clean_dataset_loaders
        monkeypatch.setitem(loaders, BenchmarkDataset.cifar_10, lambda count, folder, transform: (x[:count], y[:count]))
        # Along the sign of its gradient a logit difference moves by 0.3 * 192 * 1.1, some 65: four times its spread.
        clean, robust = robustbench.benchmark(model, n_examples=4, dataset="cifar10", threat_model="Linf", eps=0.3)
        assert (clean, robust) == (1, 0)
