"""The passes of each stage, in order: one page."""

from __future__ import annotations

from kbitc.passes.base import GraphPass
from kbitc.passes.canonicalize.clip_codes import ClipCodes
from kbitc.passes.canonicalize.drop_expand import DropExpand
from kbitc.passes.canonicalize.expand_composite import ExpandComposite
from kbitc.passes.canonicalize.expand_contrib import ExpandContrib
from kbitc.passes.canonicalize.expand_recurrent import ExpandRecurrent
from kbitc.passes.canonicalize.finish import InferShapes, NameNodes, RemoveDeadCode, SortNodes
from kbitc.passes.canonicalize.fold_affine import FoldAffine
from kbitc.passes.canonicalize.fold_batch_norm import DecomposeBatchNorm
from kbitc.passes.canonicalize.fold_constants import FoldConstants
from kbitc.passes.canonicalize.fold_shapes import FoldShapes
from kbitc.passes.canonicalize.fuse_gelu import FuseGelu
from kbitc.passes.canonicalize.fuse_hard_swish import FuseHardSwish
from kbitc.passes.canonicalize.fuse_layer_norm import FuseLayerNorm
from kbitc.passes.canonicalize.fuse_moments import FuseMoments
from kbitc.passes.canonicalize.fuse_softmax import FuseSoftmax
from kbitc.passes.canonicalize.gemm_to_matmul import GemmToMatMul
from kbitc.passes.canonicalize.if_to_where import IfToWhere
from kbitc.passes.canonicalize.inline_constant_if import InlineConstantIf
from kbitc.passes.canonicalize.inline_functions import InlineFunctions
from kbitc.passes.canonicalize.lift_constants import LiftConstants
from kbitc.passes.canonicalize.loop_to_scan import LoopToScan
from kbitc.passes.canonicalize.merge_equal import MergeEqual
from kbitc.passes.canonicalize.pow_to_mul import PowToMul
from kbitc.passes.canonicalize.remove_identity import RemoveIdentity
from kbitc.passes.canonicalize.scan_axes import ScanAxes
from kbitc.passes.canonicalize.to_float32 import ToFloat32
from kbitc.passes.canonicalize.translate_contrib import TranslateContrib
from kbitc.passes.canonicalize.upgrade_opset import UpgradeOpset

#: Run once, first: one spelling for everything.
CANONICALIZE_FORM: tuple[GraphPass, ...] = (
    InlineFunctions(),
    SortNodes(),
    InferShapes(),
    UpgradeOpset(),
    TranslateContrib(),
    ExpandComposite(),
    InlineFunctions(),
    UpgradeOpset(),
    LiftConstants(),
    InferShapes(),
    ToFloat32(),
)

#: Run over and over until none changes anything.
CANONICALIZE_SIMPLIFY: tuple[GraphPass, ...] = (
    InferShapes(),
    ExpandContrib(),
    InlineFunctions(),
    RemoveDeadCode(),
    FoldShapes(),
    FoldConstants(),
    InlineConstantIf(),
    LoopToScan(),
    ScanAxes(),
    ExpandRecurrent(),
    LiftConstants(),
    RemoveIdentity(),
    ClipCodes(),
    MergeEqual(),
    DropExpand(),
    DecomposeBatchNorm(),
    GemmToMatMul(),
    FuseHardSwish(),
    FuseGelu(),
    FuseLayerNorm(),
    FuseMoments(),
    FuseSoftmax(),
    PowToMul(),
    FoldAffine(),
    RemoveDeadCode(),
)

#: Run when nothing is left to simplify: conditions that are not constants now never will be.
CANONICALIZE_CHOOSE: tuple[GraphPass, ...] = (IfToWhere(),)

#: Run once, last.
CANONICALIZE_FINISH: tuple[GraphPass, ...] = (SortNodes(), NameNodes(), InferShapes())
