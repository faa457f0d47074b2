"""What an equalizer works on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from kbitc.graph import edit, ops
from kbitc.passes.calibrate.moments import in_groups, moments, readers
from kbitc.passes.equalize._channels import Site
from kbitc.quant.moments import InputMoments
from kbitc.quant.plan import QuantPlan
from kbitc.quant.scheme import QuantScheme


@dataclass(frozen=True)
class Setting:
    """A model that may be changed, the plan for its weights, and data.

    Attributes:
        model: canonical graph; weights keep their names and shapes.
        plan: which weight gets which scheme.
        kinds: weight name -> the view that `kbitc.graph.ops` gives it.
        feeds: calibration batches; may be empty.
    """

    model: ir.Model
    plan: QuantPlan
    kinds: Mapping[str, str]
    feeds: Sequence[Mapping[str, npt.NDArray[Any]]] = ()

    @property
    def schemes(self) -> dict[str, QuantScheme]:
        """The scheme of every planned weight by name."""
        return {entry.tensor: entry.scheme for entry in self.plan.quantized() if entry.scheme is not None}

    def nodes(self) -> list[ir.Node]:
        """The nodes with planned weights, in graph order."""
        planned = {name for entry in self.plan.quantized() for name in entry.nodes}
        return [node for node in self.model.graph if node.name in planned]

    def view(self, name: str) -> npt.NDArray[np.float32]:
        """A weight as f32 [N, T, C]."""
        weight = edit.constant(self.model.graph.initializers[name])
        return np.asarray(ops.to_view(np.asarray(weight), self.kinds[name]), np.float32)

    def groups(self, sites: Sequence[Site]) -> Iterator[list[tuple[Site, InputMoments]]]:
        """Sites with the moments of their values, as many at a time as fit in memory; none without data.

        The moments are those of the model as it is when a group begins: changes of earlier groups are seen.
        """
        by_reader = {site.readers[0].inputs[1].name or "": site for site in sites if site.readers[0].inputs[1]}
        watched = readers({name: [site.readers[0]] for name, site in by_reader.items()}) if self.feeds else []
        for group in in_groups(watched):
            found = moments(self.model, group, self.feeds)
            yield [(by_reader[item.tensor], found[item.tensor]) for item in group if item.tensor in found]
