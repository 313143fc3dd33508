"""The doctor's report as lines for people."""

from __future__ import annotations

from typing import Any

from coupfast.doctor.engines import place_of
from coupfast.wording import counted


def text(report: dict[str, Any]) -> str:
    """A report of `run` for people."""
    machine, kernels = report["machine"], report["cpu_kernels"]
    lines = [
        f"coupfast {report['coupfast']['version']} in {report['coupfast']['path']}",
        f"Python {report['python']['version']}, {machine['system']}",
        f"{machine['processor']}, {counted(machine['cores'], 'core')}, vector instructions {machine['vector_instructions']}, "
        f"{machine['free_bytes'] / 2**30:.1f} GiB free; torch uses {counted(machine['torch_threads'], 'thread')}",
        *(f"{gpu['name']}, {gpu['bytes'] / 2**30:.0f} GiB, compute capability {gpu['capability']}" for gpu in machine["gpus"]),
    ]
    if not machine["gpus"]:
        lines.append(f"no CUDA device that torch sees (torch built for CUDA: {machine['torch_cuda'] or 'no'})")
    lines.append(", ".join(f"{name} {version or '(not installed)'}" for name, version in report["packages"].items()))
    if kernels["problem"]:
        lines.append(f"C++ kernels: none, so engine 'cpu' does not run: {kernels['problem']}")
    else:
        lines.append(f"C++ kernels for {kernels['isa']}, by {kernels['version']} ({kernels['compiler']})")
    lines += ["", "Optional features"]
    for feature in report["features"]:
        state = "yes" if feature["installed"] else f"no: {', '.join(feature['missing'])} missing, {feature['install']}"
        lines.append(f"  {feature['feature']:50}  {state}")
    lines += ["", "Checks"]
    for row in report["noise"]:
        lines.append(f"  noise on {row['device']}: {row['problem'] or 'known answers, bit for bit'}")
    for row in report["weights"]:
        lines.append(f"  {row['file']}: {row['problem'] or 'SHA-256 as shipped'}")
    for engine, places in report["engines"].items():
        for place in places:
            where = f"  engine {engine} on {place['device']}, {place['dtype']}"
            if place["status"] == "refused":
                runs = [other["dtype"] for other in places if (other["device"], other["status"]) == (place["device"], "runs")]
                reason = place["detail"]
                if runs:  # an engine of one dtype, not a fault
                    lines.append(f"{where}: {' and '.join(runs)} only, {reason.partition(': ')[2] or reason}")
                else:
                    lines.append(f"{where}: does not run here ({reason})")
                continue
            rows = [row for row in report["parity"] if row["engine"] == engine and place_of(row) == place_of(place)]
            agreed = sum(row["status"] == "ok" for row in rows)
            line = f"{where}: {agreed} of {len(rows)} cases agree with the definition"
            measured = [row for row in rows if "forward_error" in row]
            if measured:
                forward = max(row["forward_error"] for row in measured)
                gradient = max(row["gradient_error"] for row in measured)
                line += f"; largest errors {forward:.1e} forward, {gradient:.1e} gradient"
            lines.append(line)
    lines += _kernel_lines(report["kernels"])
    for gpu in report["gpus"]:
        lines += _gpu_lines(gpu)
    if report["gpus"] and not report["full"]:
        lines.append(
            "  A quick look: one case of each kernel, engine cuda without PyTorch's compiler. `coupfast doctor --full` takes "
            "all of them, in several times as long"
        )
    if report["compilations"]["kernels"]:
        found = report["compilations"]
        lines.append(f"  {found['kernels']} kernels had to be compiled, which took Triton {found['seconds']:.0f} s")
    if not report["gpus"]:
        lines.append("  GPU kernels, engine cuda on the shipped networks: not checked, since no CUDA device was looked at")
    lines.append("")
    if report["ok"]:
        lines.append(f"All checks passed in {report['seconds']:.1f} s.")
    else:
        lines += [f"PROBLEM  {problem}" for problem in report["problems"]]
        lines.append(f"{len(report['problems'])} problems found in {report['seconds']:.1f} s.")
    return "\n".join(lines)


def _kernel_lines(rows: list[dict[str, Any]]) -> list[str]:
    lines = []
    for name, device in dict.fromkeys((row["kernel"], row["device"]) for row in rows):
        cases = [row for row in rows if (row["kernel"], row["device"]) == (name, device)]
        worst = max((row["error"] / row["bound"] for row in cases if row["bound"]), default=0.0)
        line = f"  {name} on {device}: {sum(row['status'] == 'ok' for row in cases)} of {len(cases)} cases agree"
        lines.append(line + (f"; largest error {worst:.2f} of its bound" if worst else ", bit for bit"))
    return lines


def _gpu_lines(report: dict[str, Any]) -> list[str]:
    lines = []
    for row in report["engine"]:
        line = f"  engine {row['engine']} on {report['device']}, {row['case']}: {row['status']}, {row['detail']}"
        lines.append(line + (f"; {row['culprit']}" if row["culprit"] else ""))
    rates = report["rates"]
    if rates["copy_bytes_per_second"]:
        lines.append(
            f"  {report['device']} copies {rates['copy_bytes_per_second'] / 1e9:.0f} GB/s and multiplies float32 matrices at "
            f"{rates['matmul_flop_per_second'] / 1e12:.2f} TFLOP/s"
        )
    for row in rates["kernels"]:
        per_second, of = (row["bytes_per_second"] / 1e9, "GB/s") if row["bytes"] else (row["flop_per_second"] / 1e12, "TFLOP/s")
        share = f"{row['share']:.0%} of {'the copy' if row['bytes'] else 'the matrix product'}"
        lines.append(f"  {row['kernel']}: {row['seconds'] * 1e6:.1f} us, {per_second:.2f} {of}, {share}")
    return lines
