"""The `fx.GraphModule` that graphopt emits, and the module hierarchy it stands on."""

from typing import Any

from torch import fx, nn


class LateModule(fx.GraphModule):
    """A `GraphModule` that may generate its code when it first runs, or is asked for it: `late`, for networks that are only looked at."""

    late: bool = False

    def __init__(self, root: nn.Module, graph: fx.Graph, class_name: str = "GraphModule", *, late: bool = False) -> None:
        self.__dict__["late"] = late
        super().__init__(root, graph, class_name)

    def recompile(self) -> Any:
        """After a change of the graph: generates the code, or sees to it that it is generated when it is needed."""
        if not self.late:
            return super().recompile()
        self.__dict__.pop("_code", None)
        type(self).forward = _generated_first  # each graph module has a class of its own
        return None

    def generate(self) -> None:
        """Generates the code now."""
        self.late = False
        self.recompile()

    def get_submodule(self, target: str) -> nn.Module:
        """As torch's, which asks every module on the way for an attribute of any kind."""
        found: nn.Module | None = self
        for name in target.split(".") if target else ():
            found = found._modules.get(name) if found is not None else None
        return found if found is not None else super().get_submodule(target)

    @property
    def code(self) -> str:
        """The source of its forward."""
        if "_code" not in self.__dict__:
            self.generate()
        return str(self.__dict__["_code"])


def _generated_first(module: LateModule, *args: Any, **kwargs: Any) -> Any:
    module.generate()
    return module.forward(*args, **kwargs)


class TrainingModule(LateModule):
    """A `GraphModule` that keeps everything its root holds: parameters that no node uses, buffers' persistence, registration order.

    Stock `GraphModule` keeps only what the graph mentions and makes every buffer persistent, so that a state dict neither loads
    into nor from the backbone.
    """

    def __init__(self, root: nn.Module, graph: fx.Graph, class_name: str = "TrainingModule", *, late: bool = False) -> None:
        # Without nodes there is nothing to copy from the root, which is taken whole, and no code to generate.
        super().__init__(nn.Module(), fx.Graph(), class_name, late=True)
        self.late = late
        # The very dicts, not copies: modules emitted from one graph must agree when `.to()` puts new buffers in place.
        self._parameters = root._parameters
        self._buffers = root._buffers
        self._non_persistent_buffers_set = root._non_persistent_buffers_set
        self._modules = dict(root._modules)
        self.training = root.training
        self.graph = graph

    def _deepcopy_init(self) -> Any:
        return TrainingModule.__init__

    def __reduce__(self) -> Any:
        raise TypeError("a training graph is not pickled: save its state dict with the spec and the decisions")


def skeleton(backbone: nn.Module, called: frozenset[str]) -> nn.Module:
    """Registers what `backbone` registers, in its order; leaves and tensors are shared, containers become plain modules.

    A container is a module that no node calls whole (`called` are those that one does); since calling it would run code that the
    graph has replaced, only its place in the hierarchy is kept.
    """

    def hold(old: nn.Module, prefix: str) -> nn.Module:
        new = nn.Module()
        new.training = old.training
        new._parameters = dict(old._parameters)
        new._buffers = dict(old._buffers)
        new._non_persistent_buffers_set = set(old._non_persistent_buffers_set)
        for name, child in old._modules.items():
            path = f"{prefix}{name}"
            keep = child is None or path in called or next(child.children(), None) is None
            new._modules[name] = child if keep else hold(child, f"{path}.")  # type: ignore[arg-type]
        return new

    return hold(backbone, "")
