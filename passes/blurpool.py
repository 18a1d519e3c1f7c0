"""blurpool: downsampling is preceded by a blur, so that a shifted image gives a shifted answer.

Zhang, "Making Convolutional Networks Shift-Invariant Again" (arXiv 1904.11486, section 3): a max pool of stride s becomes a max pool of
stride 1 and a blur of stride s. A convolution of stride s becomes one of stride 1 and a blur of stride s behind its
activation in the paper, which costs s * s times its FLOPs; here the blur comes right before it, without a stride, and the
convolution keeps its own: the same filtering of what is thrown away, at almost no cost (as Composer's BlurPool does by default). An
average pool is such a blur of its own and stays.

The network computes something else from then on, training and evaluation alike, under the same keys. `export` therefore refuses: the
backbone's class has no blurs. `graphopt.save` stores the weights with their spec, and `graphopt.load` gives the model back.

    [[pass]]
    use = "blurpool"
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, NoReturn

from pydantic import Field, StrictBool

from graphopt import ActiveMatch, Effects, Match, Pass, PassError, Selector, Status

if TYPE_CHECKING:
    from torch import Tensor, nn

    from graphopt import Editor, Graph

#: convolutions of fewer input channels read the image itself; Composer's default, too
FEWEST_CHANNELS = 16


class BlurPool(Pass):
    """Blurs what max pools and strided convolutions downsample.

    Attributes:
        select: regions whose max pools and strided 2-d convolutions change; see selectors. Default: all of the backbone.
        size: of the blur, in positions: a row of Pascal's triangle, 3 is (1, 2, 1).
        convolutions: strided ones too, of at least 16 input channels.

    Changes the network's output from its first step on, so put it in at the start of training. Refuses: a selection without any.
    """

    name: ClassVar[str] = "blurpool"

    select: Selector | None = None
    size: Annotated[int, Field(ge=2, le=7, strict=True)] = 3
    convolutions: StrictBool = True

    def match(self, graph: Graph) -> Match[dict[str, tuple[str, ...]]]:
        from graphopt.passes.layers import leaves_in

        found = {region: paths for region, paths in leaves_in(self.select, graph, self._downsamples).items() if paths}
        match = Match(tuple(found), {region.name: paths for region, paths in found.items()})
        for path in sum(found.values(), ()):
            if len(graph.fx.find_nodes(op="call_module", target=path)) > 1:
                match.refuse(path, "it is called more than once", fix="Leave it out of the selection")
        if not found:
            match.refuse("the backbone", "nothing that is selected has a max pool or a strided convolution", fix="Select what downsamples")
        return match

    def _downsamples(self, layer: nn.Module) -> bool:
        from torch import nn

        from graphopt.passes.freeze.operators import as_tuple

        if type(layer) is nn.MaxPool2d:
            return max(as_tuple(layer.stride, 2)) > 1 and not layer.return_indices and not layer.ceil_mode
        return self.convolutions and type(layer) is nn.Conv2d and max(layer.stride) > 1 and layer.in_channels >= FEWEST_CHANNELS

    def rewrite(self, edit: Editor, match: ActiveMatch[dict[str, tuple[str, ...]]]) -> Effects:
        import copy

        from torch import nn

        from graphopt.ir.nodes import leaf
        from graphopt.passes.freeze.operators import as_tuple
        from graphopt.passes.layers import Blur, beside

        effects, count = Effects(to_original_state=_refuse_export), 0
        device = next((p.device for p in edit.graph.module.parameters()), None)
        for name in match.names:
            before = count
            for path in match.decision[name]:
                if not (nodes := edit.calls(path)):
                    effects.skip(path, "an earlier pass has removed it")
                    continue
                (node,), count = nodes, count + 1
                layer = leaf(edit.graph, node)
                if isinstance(layer, nn.MaxPool2d):
                    blur, finer = Blur(self.size, as_tuple(layer.stride, 2)).to(device), copy.copy(layer)
                    finer.stride = 1
                    edit.replace_leaf(node, finer)
                    blurred = edit.call_module(beside(edit.graph, path, "blur"), blur, (node,), after=node)
                    edit.redirect(node, blurred, [u for u in node.users if u is not blurred])
                else:
                    blurred = edit.call_module(beside(edit.graph, path, "blur"), Blur(self.size).to(device), node.args[:1], before=node)
                    edit.set_call(node, args=(blurred,))
            if count > before:
                effects.mark(name, Status.REWIRED, blurs=count - before)
        effects.figures = {"blurs": count}
        return effects


def _refuse_export(_: dict[str, Tensor]) -> NoReturn:
    fix = "Store the weights with their spec: graphopt.save(plan, path); graphopt.load(path) gives the model back"
    raise PassError("blurs are part of what the network computes, and the backbone's class has none", where="blurpool", fix=fix)
