"""The command line. Parses, calls one function of `kbitc.commands` or `kbitc.driver`, prints; decides nothing else.

Only click is imported here, so that `--help` answers at once; every command imports what it needs when it runs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from kbitc import __version__
from kbitc.errors import KbitcError, ResourceError, UsageError

JSON_HELP = "Print one JSON object on standard output and nothing else there."
INTERRUPTED = 130


def _json(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option("--json", "as_json", is_flag=True, help=JSON_HELP)(command)


def _variant(command: Callable[..., Any]) -> Callable[..., Any]:
    text = "Run this variant, such as avx2.  [default: $KBITC_VARIANT, else the best for this machine]"
    return click.option("--variant", metavar="NAME", help=text)(command)


def _quantization(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that compile and quantize share, in the order of the help page."""
    options = [
        click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Where the result goes."),
        click.option("--bits", type=int, help="Bits of a weight, 1 to 8.  [default: 4]"),
        click.option("--scheme", help="Exact scheme: int4:b32, uint3:b64:zp, nf4:b64, int8:c; float32 for none."),
        click.option("--block", type=int, help="Weights per scale along the reduction axis.  [default: 32]"),
        click.option(
            "--activations",
            help="float, dynamic (int8 at run time) or static (integer graph: ranges from --calibration, or the "
            "model's own).  [default: the model's own ranges, else dynamic]",
        ),
        click.option("--act-bits", type=int, help="Bits of a static activation, 4 to 8.  [default: 8]"),
        click.option("--integer-only", is_flag=True, help="Static, with no float operator between input and output."),
        click.option("--observer", help="Ranges of static activations: measured, percentile, minmax, mse ..."),
        click.option("--target", default="host", show_default=True, help="See `kbitc targets`."),
        click.option("--shape", "shapes", multiple=True, metavar="NAME=1x3x224x224", help="Fix an input's shape."),
        click.option("--constant", "constants", multiple=True, metavar="NAME=16000", help="Fix an input's value."),
        click.option("--exclude", multiple=True, metavar="PATTERN", help="Keep weights float: name, glob or type:Op."),
        click.option("--centre", is_flag=True, help="Quantize MatMul weights without the means of their blocks."),
        click.option("--proxy", type=float, metavar="PERCENT", help="Keep so many inputs of a MatMul at 8 bits."),
        click.option(
            "--calibration", type=click.Path(path_type=Path), help="Sample inputs: .npz, .npy or a folder of them."
        ),
        click.option("--solver", help="rtn, hqq, gptq, awq, ...  [default: gptq with --calibration, else rtn]"),
        click.option("--equalize", metavar="A,B", help="smoothquant, hadamard, ... or none; see docs/solvers.md."),
        click.option(
            "--sequential/--no-sequential",
            default=None,
            help="Fit each layer to make up for those quantized before.  [default: gptq, fewer than 8 bits]",
        ),
        click.option("--min-sqnr", type=float, metavar="DB", help="Fail (exit 6) when an output is further off."),
        click.option("--dump-dir", type=click.Path(path_type=Path), help="Folder for what each stage leaves."),
        click.option("--force", is_flag=True, help="Replace an existing output."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def _planning(command: Callable[..., Any]) -> Callable[..., Any]:
    """Where the plan comes from and what it has to keep: options of compile and quantize."""
    path = click.Path(path_type=Path)
    options = [
        click.option("--plan", type=path, metavar="FILE", help="Take schemes from a plan (JSON); it goes first."),
        click.option("--write-plan", type=path, metavar="FILE", help="Write the plan that was carried out."),
        click.option("--target-bpw", type=float, metavar="BITS", help="Mix widths: at most so many bits a weight."),
        click.option("--size-budget", metavar="SIZE", help="Mix widths: at most 20MB (or 20MiB) on disk in all."),
        click.option("--time-budget", metavar="TIME", help="Mix widths: products take at most 1.5ms, as predicted."),
        click.option("--max-drop", metavar="PERCENT", help="Mix widths: smallest whose score falls at most 0.5%."),
        click.option("--metric", help="Score of --max-drop: top1, sqnr, cosine, or a .py with score(outputs, labels)."),
        click.option("--labels", type=path, metavar="FILE", help="Labels of the calibration samples, for --metric."),
        click.option("--allocate", metavar="NAME", help="sensitivity (default), second_order or uniform."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="kbitc")
def cli() -> None:
    """Compile a trained ONNX model to k-bit weights and integer kernels."""


@cli.command("compile", short_help="Quantize a model and compile it into a bundle.")
@click.argument("model", type=click.Path(path_type=Path))
@_quantization
@_planning
@click.option("--with-runtime", is_flag=True, help="Put the native runner and its libraries into the bundle.")
@click.option("--keep-onnx", is_flag=True, help="Put the quantized ONNX into the bundle, for `kbitc verify`.")
@click.option("--never-slower", is_flag=True, help="Keep weights float whose layers would be slower than float.")
@click.option("--tuned", type=click.Path(path_type=Path), metavar="FILE", help="Schedules of `kbitc tune`, or none.")
@click.option("--debug-accumulators", is_flag=True, help="Also output int8 codes and int32 accumulators.")
@_json
def compile_command(model: Path, output: Path, as_json: bool, calibration: Path | None, **arguments: Any) -> None:
    """Quantize MODEL and compile it into the bundle folder OUTPUT (by custom NAME.kbit)."""
    _produce(model, output, as_json, calibration, arguments, bundle=True)


@cli.command(short_help="Quantize a model and write it as ONNX.")
@click.argument("model", type=click.Path(path_type=Path))
@_quantization
@_planning
@click.option(
    "--format", "form", default="onnx", show_default=True, help="onnx, qdq, matmulnbits or compressed-tensors."
)
@click.option("--widen", is_flag=True, help="Write codes that a format lacks in its next wider type.")
@_json
def quantize(model: Path, output: Path, as_json: bool, calibration: Path | None, **arguments: Any) -> None:
    """Quantize MODEL and write an ONNX file that any runtime executes, or another format."""
    _produce(model, output, as_json, calibration, arguments, bundle=False)


def _produce(
    model: Path, output: Path, as_json: bool, calibration: Path | None, arguments: dict[str, Any], *, bundle: bool
) -> None:
    from kbitc import driver, options
    from kbitc.commands import show
    from kbitc.trace import Trace

    chosen = options.from_arguments(**arguments)
    work = driver.compile_model if bundle else driver.quantize_model
    with show.progress(quiet=as_json) as on_stage:
        trace = Trace(chosen.dump_dir, on_stage)
        report = work(model, output, chosen, calibration, trace)
    show.emit(report.as_json(), as_json, lambda: show.report(report))


@cli.command(short_help="Run a bundle on inputs from a file.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--input", "inputs", required=True, type=click.Path(path_type=Path), help=".npz or .npy of inputs.")
@click.option("--output", type=click.Path(path_type=Path), help="Write the outputs to this .npz.")
@click.option("--threads", type=int, help="Threads of one run.  [default: all cores]")
@_variant
@_json
def run(
    bundle: Path, inputs: Path, output: Path | None, threads: int | None, variant: str | None, as_json: bool
) -> None:
    """Run BUNDLE once and print what came out."""
    from kbitc.commands import run as command
    from kbitc.commands import show

    result = command.run_bundle(bundle, inputs, output, threads, variant)
    show.emit(result, as_json, lambda: show.run(result))


@cli.command(short_help="Time a bundle against its float build and onnxruntime.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--against", type=click.Path(path_type=Path), help="The model the bundle was made from.")
@click.option("--input", "inputs", type=click.Path(path_type=Path), help="Inputs to time with (else made up).")
@click.option("--shape", "shapes", multiple=True, metavar="NAME=1x3x224x224", help="Shape of made-up inputs.")
@click.option("--threads", type=int, default=1, show_default=True, help="Threads of every engine.")
@click.option("--rounds", type=int, default=20, show_default=True, help="Interleaved rounds.")
@click.option("--layers", is_flag=True, help="Time every layer; beside it the float build and the machine's limit.")
@_variant
@_json
def bench(
    bundle: Path,
    against: Path | None,
    inputs: Path | None,
    shapes: tuple[str, ...],
    threads: int,
    rounds: int,
    layers: bool,
    variant: str | None,
    as_json: bool,
) -> None:
    """Interleaved rounds of BUNDLE, the float build for the same target, and onnxruntime fp32."""
    from kbitc.commands import bench as command
    from kbitc.commands import layers as by_layer
    from kbitc.commands import show, show_layers

    measure = by_layer.bench_layers if layers else command.bench_bundle
    with show.progress(quiet=as_json) as on_stage:
        result = measure(bundle, against, inputs, shapes, threads, rounds, on_stage, variant=variant)
    show.emit(result, as_json, lambda: show_layers.layers(result) if layers else show.bench(result))


@cli.command(short_help="Check a bundle's integrity and its numbers.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--model", type=click.Path(path_type=Path), help="The float model to compare with.")
@click.option("--input", "inputs", type=click.Path(path_type=Path), help="Inputs to compare on (else made up).")
@click.option("--min-sqnr", type=float, metavar="DB", help="Fail (exit 6) when an output is further off.")
@_variant
@_json
def verify(
    bundle: Path, model: Path | None, inputs: Path | None, min_sqnr: float | None, variant: str | None, as_json: bool
) -> None:
    """Check every hash of BUNDLE, then compare it with the ONNX in it (--keep-onnx) and with MODEL, if any."""
    from kbitc.commands import show
    from kbitc.commands import verify as command

    result = command.verify_bundle(bundle, model, inputs, min_sqnr, variant)
    show.emit(result, as_json, lambda: show.verify(result))


@cli.command(short_help="Show what is in a model or a bundle.")
@click.argument("path", metavar="MODEL|BUNDLE", type=click.Path(path_type=Path))
@click.option("--plan", type=click.Path(path_type=Path), metavar="FILE", help="Check a plan and show what it makes.")
@click.option("--write-plan", type=click.Path(path_type=Path), metavar="FILE", help="Write the plan that is shown.")
@_json
def inspect(path: Path, plan: Path | None, write_plan: Path | None, as_json: bool) -> None:
    """Inputs, outputs, operators, bytes and bits per weight, what would be quantized, what not, and why."""
    from kbitc.commands import inspect as command
    from kbitc.commands import show

    result = command.inspect_path(path, plan, write_plan)
    show.emit(result, as_json, lambda: show.inspect(result))


@cli.command(short_help="Measure where accuracy goes, layer by layer.")
@click.argument("model", type=click.Path(path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="The page, report.html.")
@click.option("--calibration", type=click.Path(path_type=Path), help="Sample inputs: .npz, .npy or a folder of them.")
@click.option("--bits", type=int, help="Bits of a weight, 1 to 8.  [default: 4]")
@click.option("--scheme", help="Exact scheme: int4:b32, uint3:b64:zp, nf4:b64, int8:c.")
@click.option("--block", type=int, help="Weights per scale along the reduction axis.  [default: 32]")
@click.option("--activations", default="dynamic", show_default=True, help="float, or dynamic (int8 at run time).")
@click.option("--target", default="host", show_default=True, help="See `kbitc targets`.")
@click.option("--shape", "shapes", multiple=True, metavar="NAME=1x3x224x224", help="Fix an input's shape.")
@click.option("--exclude", multiple=True, metavar="PATTERN", help="Keep weights float: name, glob or type:Op.")
@click.option("--plan", type=click.Path(path_type=Path), metavar="FILE", help="Analyse this plan.")
@click.option("--write-plan", type=click.Path(path_type=Path), metavar="FILE", help="Write the suggested plan.")
@click.option("--solver", help="How weights are rounded: rtn, hqq, gptq, awq, ...  [default: rtn]")
@click.option("--estimate", is_flag=True, help="Estimate sensitivities to second order: quicker for many layers.")
@click.option("--force", is_flag=True, help="Replace existing outputs.")
@_json
def analyze(
    model: Path, output: Path, calibration: Path | None, estimate: bool, write_plan: Path | None, as_json: bool,
    **arguments: Any,
) -> None:  # fmt: skip
    """Write one HTML page about the quantization of MODEL, and its data as JSON beside it."""
    from kbitc import options
    from kbitc.commands import analyze as command
    from kbitc.commands import show
    from kbitc.trace import Trace

    chosen = options.from_arguments(**arguments)
    command.check_outputs(output, write_plan, chosen.force)
    with show.progress(quiet=as_json) as on_stage:
        result = command.analyze_model(model, calibration, chosen, Trace(on_stage=on_stage), estimate=estimate)
    command.write_analysis(result, output, write_plan)
    show.emit(result, as_json, lambda: show.analyze(result, output))


@cli.command(short_help="Search fast schedules for a model on this machine.")
@click.argument("path", metavar="MODEL|BUNDLE", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), help="The database.  [default: in the cache folder]")
@click.option("--shape", "shapes", multiple=True, metavar="NAME=1x128", help="Sizes to tune for.")
@click.option("--scheme", help="Of a MODEL's weights: int4:b32, uint3:b64:zp, nf4:b64, int8:c; float32 for none.")
@click.option("--activations", default="dynamic", show_default=True, help="Of a MODEL: float or dynamic.")
@click.option("--target", default="host", show_default=True, help="Of a MODEL; see `kbitc targets`.")
@_json
def tune(path: Path, output: Path | None, shapes: tuple[str, ...], as_json: bool, **compiling: Any) -> None:
    """Time schedules of the products of MODEL or BUNDLE; `kbitc compile` takes what is faster from the database."""
    from kbitc.commands import show, show_layers
    from kbitc.commands import tune as command

    with show.progress(quiet=as_json) as on_stage:
        result = command.tune_path(path, output, shapes, compiling, on_stage)
    show.emit(result, as_json, lambda: show_layers.tune(result))


@cli.command(short_help="Show what this machine can compile for and run.")
@_json
def targets(as_json: bool) -> None:
    """Every target: whether it compiles and runs here, what is missing and how to get it."""
    from kbitc.commands import show
    from kbitc.commands import targets as command

    result = command.list_targets()
    show.emit(result, as_json, lambda: show.targets(result))


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: every failure becomes one line on standard error and the exit code of its kind."""
    sys.exit(_guarded(list(sys.argv[1:] if arguments is None else arguments)))


def _guarded(arguments: list[str]) -> int:
    try:
        result = cli.main(args=arguments, prog_name="kbitc", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except KbitcError as error:
        return _fail(error)
    except click.ClickException as error:
        return _fail(UsageError(error.format_message().rstrip("."), remedy=_help_hint(error)))
    except (click.Abort, KeyboardInterrupt):
        click.echo("kbitc: interrupted", err=True)
        return INTERRUPTED
    except BrokenPipeError:
        return ResourceError.exit_code
    except (OSError, MemoryError) as error:
        return _fail(ResourceError("out of memory" if isinstance(error, MemoryError) else str(error)))
    except Exception as error:
        from kbitc.commands.crash import save_reproducer

        return _fail(save_reproducer(error, arguments))


def _help_hint(error: click.ClickException) -> str:
    context = getattr(error, "ctx", None)
    return f"see `{context.command_path if context is not None else 'kbitc'} --help`"


def _fail(error: KbitcError) -> int:
    click.echo(f"kbitc: error: {error}", err=True)
    return error.exit_code


if __name__ == "__main__":
    main()
