"""kbitc: a graph-level k-bit compiler. ONNX in, a verified module with integer kernels out.

The three functions here are the Python form of the command line. Nothing heavy is imported until they are called.
"""

from __future__ import annotations

from os import PathLike
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import onnx

    from kbitc.bundle.runtime import Model
    from kbitc.report import Report

__version__ = "0.1.0"
__all__ = ["__version__", "compile", "load", "quantize"]


def compile(
    model: str | PathLike[str] | onnx.ModelProto,
    output: str | PathLike[str],
    *,
    calibration: Any = None,
    **options: Any,
) -> Report:
    """Quantize a model and compile it into a bundle.

    Args:
        model: path of an ONNX file, or the model in memory.
        output: folder of the bundle, by custom NAME.kbit.
        calibration: .npz, .npy or folder, or an iterable of feeds {name: array}.
        options: those of the command line (`kbitc.options.from_arguments` has the defaults):
            bits: bits of a weight, 1 to 8 (default 4); or give `scheme`.
            scheme: exact form such as "int4:b32", "uint3:b64:zp", "nf4:b64", "int8:c"; "float32" quantizes nothing.
            block: weights per scale along the reduction axis (default 32).
            activations: "dynamic" (int8 at run time), "static" (planned from `calibration`) or "float".
            act_bits: bits of a static activation, 4 to 8 (default 8).
            integer_only: static, with no float operator between input and output; refused where one would be left.
            observer: what gives the ranges of static activations: a file of passes/observers.
            target: host, x86 (every variant in one bundle), x86:avx2, x86:avxvnni, x86:avx512vnni, x86:avx512vbmi,
                x86:amx, arm-neon[:dotprod,i8mm], cuda[:sm_80|sm_90] or reference.
            shapes: texts such as "x=1x3x224x224"; a letter or ? keeps a dimension symbolic.
            constants: texts such as "sr=16000"; the input leaves the signature and has this value.
            exclude: node or tensor names, globs, or type:Op, whose weights stay float.
            min_sqnr: least SQNR in dB against the float model.
            dump_dir: folder that receives what each stage leaves.
            force: replace an existing output.
            debug_accumulators: integer contractions also output int8 codes and int32 accumulators.
            with_runtime: put the native runner and the runtime libraries into the bundle.
            keep_onnx: put the quantized ONNX into the bundle, so that `kbitc verify` can compare the module with it.
            solver: how weights are rounded: rtn, mse_clip, gptq, ... (default gptq with calibration data, else rtn).
            equalize: edits of the float graph "A,B" or "none" (default bias_correction with calibration data).
            sequential: calibrate each layer on the output of quantized ones; by default where gptq solves weights of
                fewer than 8 bits.
            never_slower, tuned: see `kbitc.options.Speed`.
            centre, proxy: see docs/schemes.md.
            plan, write_plan, target_bpw, size_budget, time_budget, max_drop, metric, labels, allocate: see
                docs/plan.md.

    Returns:
        The report that is also in the bundle.

    Raises:
        KbitcError: with the reason in one line; nothing is written then.
    """
    from kbitc import driver
    from kbitc.options import from_arguments

    return driver.compile_model(model, output, from_arguments(**options), calibration)


def quantize(
    model: str | PathLike[str] | onnx.ModelProto,
    output: str | PathLike[str],
    *,
    calibration: Any = None,
    **options: Any,
) -> Report:
    """Quantize a model and write it as an ONNX file that any runtime executes.

    Arguments as for `compile`, but for those that say something of a bundle; and `form` and `widen`, which are
    --format and --widen of the command line.
    """
    from kbitc import driver
    from kbitc.options import BUNDLE_ONLY, from_arguments

    for name in BUNDLE_ONLY:
        if name in options:
            raise TypeError(f"quantize() writes no bundle, so it has no option {name!r}")
    return driver.quantize_model(model, output, from_arguments(**options), calibration)


def load(path: str | PathLike[str], *, threads: int | None = None, variant: str | None = None) -> Model:
    """Load a bundle: a callable that takes and returns dicts of numpy arrays.

    Args:
        path: folder of the bundle.
        threads: threads of one run; None: one for each core.
        variant: the only variant that will do, such as "avx2"; None: what the environment variable KBITC_VARIANT
            says, else the best that this machine runs. `target_name` of the model says which one that is.

    Raises:
        BundleError: when the bundle is damaged or belongs to another machine, or lacks the variant.
    """
    from kbitc.bundle.runtime import load as load_bundle

    return load_bundle(path, threads=threads, variant=variant)
