"""Write SmolLM2-135M as ONNX, straight from its GGUF file: no torch, no transformers.

    python examples/accuracy/build_smollm.py [--out smollm.onnx] [--context 256]

A decoder of Llama's shape (Touvron et al., arXiv 2302.13971): RMSNorm, rotary positions (Su et al., arXiv 2104.09864),
9 query heads that share 3 key and value heads (Ainslie et al., arXiv 2305.13245), SwiGLU (Shazeer, arXiv 2002.05202).
It reads a whole window at once, which is what a perplexity needs; there is no key-value cache. The table of tokens and
the output layer are one tensor in the checkpoint and two here, transposed to each other.

Input:  tokens int64 [batch, context]
Output: logits f32 [batch, context, vocabulary]
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from gguf_file import GgufFile
from onnx import TensorProto, helper, numpy_helper

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import fetch

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
CONTEXT = 256  # tokens
NAME = "smollm-{}.onnx"
OPSET, IR_VERSION = 20, 10
MASKED = -10000.0  # added to the score of a later token


class Graph:
    """Nodes and weights of an ONNX graph in the making."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: dict[str, onnx.TensorProto] = {}

    def add(self, op: str, *inputs: str, outputs: int = 0, **attributes: Any) -> Any:
        """A node; the name of its output, or a list of names where `outputs` says how many."""
        names = [f"{op.lower()}_{len(self.nodes)}_{i}" for i in range(outputs or 1)]
        self.nodes.append(helper.make_node(op, list(inputs), names, f"{op}_{len(self.nodes)}", **attributes))
        return names if outputs else names[0]

    def constant(self, name: str, value: npt.ArrayLike, dtype: Any = np.float32) -> str:
        """A weight by this name, stored once."""
        if name not in self.weights:
            self.weights[name] = numpy_helper.from_array(np.ascontiguousarray(value, dtype), name)
        return name

    def shape(self, *sizes: int) -> str:
        """The shape as an int64 weight; 0 keeps a dimension."""
        return self.constant("shape_" + "_".join(map(str, sizes)), sizes, np.int64)


def halves_together(weight: npt.NDArray[np.float32], heads: int) -> npt.NDArray[np.float32]:
    """Rows of a query or key projection with the two halves of each head apart; GGUF interleaves them.

    weight: f32 [heads * size, inputs]; row 2 i + j of a head becomes its row j * size / 2 + i.
    """
    return weight.reshape(heads, -1, 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


class Decoder:
    """Builds the graph of one GGUF file for windows of `context` tokens."""

    def __init__(self, source: GgufFile, context: int) -> None:
        """Read the sizes; the weights are read as the graph grows."""
        facts = {key.removeprefix("llama."): value for key, value in source.metadata.items()}
        self.source, self.context, self.graph = source, context, Graph()
        self.layers: int = facts["block_count"]
        self.width: int = facts["embedding_length"]
        self.heads: int = facts["attention.head_count"]
        self.shared: int = facts["attention.head_count_kv"]
        self.size = self.width // self.heads  # of a head
        self.epsilon: float = facts["attention.layer_norm_rms_epsilon"]
        angles = np.outer(np.arange(context), facts["rope.freq_base"] ** -(np.arange(0, self.size, 2) / self.size))
        angles = np.concatenate([angles, angles], axis=1)  # [context, size]
        self.cosine = self.graph.constant("rope_cosine", np.cos(angles))
        self.sine = self.graph.constant("rope_sine", np.sin(angles))
        self.mask = self.graph.constant("later_tokens", np.triu(np.full((context, context), MASKED), 1))

    def norm(self, x: str, name: str) -> str:
        """RMSNorm over the last axis: x / sqrt(mean(x^2) + epsilon) * weight."""
        add, constant = self.graph.add, self.graph.constant
        mean = add("ReduceMean", add("Mul", x, x), constant("last_axis", [-1], np.int64), keepdims=1)
        root = add("Sqrt", add("Add", mean, constant("epsilon", self.epsilon)))
        return str(add("Mul", add("Div", x, root), constant(name, self.source.tensor(name))))

    def linear(self, x: str, name: str, heads: int = 0) -> str:
        """x times the transposed weight; with `heads`, its rows are put in the order that `rotate` needs."""
        weight = self.source.tensor(name)
        weight = halves_together(weight, heads) if heads else weight
        return str(self.graph.add("MatMul", x, self.graph.constant(name, weight.T)))

    def by_head(self, x: str, heads: int) -> str:
        """[batch, context, heads * size] -> [batch, heads, context, size]."""
        split = self.graph.add("Reshape", x, self.graph.shape(0, self.context, heads, self.size))
        return str(self.graph.add("Transpose", split, perm=[0, 2, 1, 3]))

    def rotate(self, x: str) -> str:
        """Rotary positions: x cos + (-second half, first half) sin; [batch, heads, context, size]."""
        add = self.graph.add
        first, second = add("Split", x, outputs=2, axis=-1, num_outputs=2)
        turned = add("Concat", add("Neg", second), first, axis=-1)
        return str(add("Add", add("Mul", x, self.cosine), add("Mul", turned, self.sine)))

    def attention(self, x: str, layer: str) -> str:
        """Attention of every token to itself and the earlier ones; heads // shared queries use one key and value."""
        add, shape, context = self.graph.add, self.graph.shape, self.context
        query = self.rotate(self.by_head(self.linear(x, f"{layer}.attn_q.weight", self.heads), self.heads))
        key = self.rotate(self.by_head(self.linear(x, f"{layer}.attn_k.weight", self.shared), self.shared))
        value = self.by_head(self.linear(x, f"{layer}.attn_v.weight"), self.shared)
        grouped = (0, self.shared, self.heads // self.shared * context)
        query = add("Mul", query, self.graph.constant("one_over_root_of_size", self.size**-0.5))
        query = add("Reshape", query, shape(*grouped, self.size))
        scores = add("MatMul", query, add("Transpose", key, perm=[0, 1, 3, 2]))
        scores = add("Add", add("Reshape", scores, shape(0, self.heads, context, context)), self.mask)
        shares = add("Reshape", add("Softmax", scores, axis=-1), shape(*grouped, context))
        mixed = add("Reshape", add("MatMul", shares, value), shape(0, self.heads, context, self.size))
        joined = add("Reshape", add("Transpose", mixed, perm=[0, 2, 1, 3]), shape(0, context, self.width))
        return self.linear(joined, f"{layer}.attn_output.weight")

    def feed_forward(self, x: str, layer: str) -> str:
        """SwiGLU: down(silu(gate(x)) * up(x))."""
        add = self.graph.add
        gate = self.linear(x, f"{layer}.ffn_gate.weight")
        active = add("Mul", gate, add("Sigmoid", gate))
        return self.linear(add("Mul", active, self.linear(x, f"{layer}.ffn_up.weight")), f"{layer}.ffn_down.weight")

    def build(self) -> onnx.ModelProto:
        """The model; tokens int64 [batch, context] -> logits f32 [batch, context, vocabulary]."""
        add, table = self.graph.add, "token_embd.weight"
        x = add("Gather", self.graph.constant(table, self.source.tensor(table)), "tokens", axis=0)
        for index in range(self.layers):
            layer = f"blk.{index}"
            x = add("Add", x, self.attention(self.norm(x, f"{layer}.attn_norm.weight"), layer))
            x = add("Add", x, self.feed_forward(self.norm(x, f"{layer}.ffn_norm.weight"), layer))
        head = self.graph.constant("output.weight", self.source.tensor(table).T)
        self.graph.nodes.append(helper.make_node("MatMul", [self.norm(x, "output_norm.weight"), head], ["logits"]))
        tokens = helper.make_tensor_value_info("tokens", TensorProto.INT64, ["batch", self.context])
        sizes = ["batch", self.context, self.source.shapes[table][0]]
        logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, sizes)
        weights = list(self.graph.weights.values())
        graph = helper.make_graph(self.graph.nodes, "smollm2", [tokens], [logits], weights)
        opsets = [helper.make_opsetid("", OPSET)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="kbitc-examples")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Write SmolLM2-135M as ONNX from its GGUF file.")
    parser.add_argument("--out", type=Path, help="file to write (default: beside the GGUF file)")
    parser.add_argument("--context", type=int, default=CONTEXT, help="tokens of a window (default %(default)s)")
    options = parser.parse_args()
    folder = fetch.fetch("smollm2-135m")
    out = options.out or folder / NAME.format(options.context)
    partial = out.with_suffix(".partial")
    onnx.save(Decoder(GgufFile(folder / GGUF), options.context).build(), partial)
    os.replace(partial, out)
    print(f"{out}: {out.stat().st_size / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
