"""A whole model of PyG, `forward(x, edge_index)`, over mini-batches."""

from __future__ import annotations

import copy
import inspect
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from dngd.errors import UserError
from dngd.models.graph_batch import GraphBatch, LayerEdges
from dngd.models.joined_layers import JoinedLayers, join_layers
from dngd.models.pyg_norm import TAKES_COEFFICIENTS, WholeGraphNorm, check_sampled, places_of, pyg_name

EDGE_NAMES = ("edge_index", "adj_t", "adj", "edges")
"""What a model's second argument is called where it takes a graph."""


TOLERANCE = 1e-3
"""Of the largest output, by which rounding may differ."""


class PyGModel(nn.Module):
    """A model of PyG, `model(x, edge_index)`, as a module over GraphBatch; Trainer makes one by itself.

    ::

        from torch_geometric.nn import GraphSAGE
        trainer = dngd.Trainer(config, module=lambda shape: GraphSAGE(shape.num_features, 64, 2, shape.num_classes))
        model = trainer.best_model()  # a GraphSAGE: model(x, edge_index)

    model: its forward takes rows and edges, and edge weights where it has an argument `edge_weight` and the graph has
    weights; others must have defaults. It runs once a batch, on the sampled neighbourhoods, and the seeds' rows are
    returned. With as many message-passing layers as the configuration's num_layers that is exact on whole
    neighbourhoods. Sums and degrees of a convolution's own (GIN, PNA) are of the neighbours that were sampled.

    Convolutions that normalise as GCN does get the whole graph's coefficients (LayerEdges.gcn_coefficients), which a
    sample does not tell: they are switched to normalize=False, and `plain` switches back; cached=True is off
    meanwhile. Outer rows, whose neighbours no output needs, see themselves alone. Of a graph that keeps self loops
    PyG counts them as the loops that it would add, and dngd as edges beside these.

    A PyGStack is faster: it computes the rows that a layer must, and is evaluated layer by layer; here every layer
    computes all of them, unless the model takes `num_sampled_nodes_per_hop`, as PyG's own do (without jk), and
    evaluation computes a node once for each neighbourhood that it is in. BatchNorm sees the outer rows, too.

    The state_dict has the model's own names. Raises UserError for further arguments without a default, and for
    convolutions that normalise otherwise by degrees of nodes beyond the sample.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        parameters = _parameters(model) or []
        self._takes = {parameter.name for parameter in parameters}
        self._wants_weight = any(p.name == "edge_weight" and p.default is p.empty for p in parameters)
        known = [p.name for p in parameters[:2]] + ["edge_weight"]
        others = [p.name for p in _required(parameters) if p.name not in known]
        if others:
            raise UserError(
                f"{type(model).__name__}.forward wants {' and '.join(others)} beside rows and edges, which a batch "
                "does not have; give it a default, or write forward(batch: dngd.GraphBatch)"
            )
        self._norm = WholeGraphNorm()
        self._kept: list[tuple[nn.Module, str, Any]] = []
        for name, module in model.named_modules():
            self._adapt(name, module)
        self.register_state_dict_post_hook(_without_prefix)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_with_prefix)  # type: ignore[no-untyped-call]

    def forward(self, batch: GraphBatch) -> Tensor:
        """Return the seeds' outputs, [n, C]."""
        joined = join_layers(batch.layers)
        arguments: dict[str, Any] = {}
        if {"num_sampled_nodes_per_hop", "num_sampled_edges_per_hop"} <= self._takes and self._can_trim(joined):
            arguments = {
                "num_sampled_nodes_per_hop": joined.nodes_per_hop,
                "num_sampled_edges_per_hop": joined.edges_per_hop,
            }
        out = self._run(batch.x, joined.edges, arguments)
        return out[: batch.layers[-1].num_dst] if isinstance(out, Tensor) else out

    def plain(self) -> nn.Module:
        """Return a copy of the model with the normalisation of its own, for `model(x, edge_index)` on any graph."""
        copied = copy.deepcopy(self)
        for module, name, value in copied._kept:
            setattr(module, name, value)
        for module in copied.model.modules():
            for key in [k for k, hook in module._forward_pre_hooks.items() if isinstance(hook, WholeGraphNorm)]:
                del module._forward_pre_hooks[key], module._forward_pre_hooks_with_kwargs[key]
        return copied.model

    @torch.no_grad()
    def check(self, num_features: int, num_layers: int) -> None:
        """Raise UserError, or warn, if what the seeds' outputs depend on is not in a batch; see the two checks."""
        if not self._check_reach(num_features, num_layers):
            self._check_alike(num_features, num_layers)

    def _check_reach(self, num_features: int, num_layers: int) -> bool:
        """Raise UserError if an output depends on nodes that are more than num_layers edges away, and warn if it
        depends on nodes that no path leads to: on a path of nodes, those far away are made NaN.

        Returns whether it warned. A model that cannot run on that path is left to the other check.
        """
        length = num_layers + 17
        device = next((parameter.device for parameter in self.model.parameters()), torch.device("cpu"))
        nodes = torch.arange(length, device=device)
        ones = torch.ones(length - 1, device=device)
        edges = LayerEdges(
            edge_index=torch.stack([nodes[1:], nodes[:-1]]),
            num_src=length + 1,
            num_dst=length,
            degrees=nodes.new_ones(length + 1),
            totals=torch.ones(length + 1, device=device),
            edge_weight=ones if self._wants_weight else None,
        )
        rows = torch.linspace(0.1, 1.0, (length + 1) * num_features, device=device).view(length + 1, num_features)

        def reaches(hidden: slice) -> bool:
            x = rows.clone()
            x[hidden] = float("nan")
            with torch.random.fork_rng(devices=[]):
                out: Tensor = self._run(x, edges, {})
            return bool(out[0].isnan().any()) and out.shape[0] == length + 1

        modes = {module: module.training for module in self.modules()}
        try:
            self.eval()
            if reaches(slice(0, 0)):
                return False
            hops = num_layers
            is_global = reaches(slice(length, None))
            while not is_global and hops + 1 < length and reaches(slice(hops + 1, length)):
                hops += 1
        except UserError:
            raise
        except Exception:
            return False
        finally:
            for module, mode in modes.items():
                module.training = mode
        name = type(self.model).__name__
        if is_global:
            warnings.warn(
                f"an output of {name} depends on all nodes that it is run with, those without a path to it included "
                "(as GraphNorm's do), so that it differs from batch to batch, and from that on the whole graph",
                stacklevel=2,
            )
        elif hops > num_layers:
            beyond = hops if hops + 1 < length else f"{hops} or more"
            raise UserError(
                f"an output of {name} depends on nodes {beyond} edges away, and num_layers={num_layers} samples no "
                f"further than that; use num_layers={hops}, with a fanout for each, or a shallower model"
            )
        return is_global

    def _check_alike(self, num_features: int, num_layers: int) -> None:
        """Warn if the seeds' outputs, from all in-neighbours up to num_layers away, are not those of the model alone on
        the whole graph: on a small directed one, in evaluation mode.

        So it is with degrees that the model counts by itself, out-edges, and numbers of nodes. Of a model that
        cannot run on that graph this is said; one that gives something else each time is not judged.
        """
        if any(parameter.device.type != "cpu" for parameter in self.model.parameters()):
            return
        batch, x, edge_index = small_batch(num_features, num_layers, weighted=self._wants_weight)
        weight = {"edge_weight": torch.ones(edge_index.shape[1])} if self._wants_weight else {}
        modes = {module: module.training for module in self.modules()}
        try:
            with torch.random.fork_rng(devices=[]):
                alone = self.plain().eval()
                wanted, again = (alone(x, edge_index, **weight)[batch.seeds] for _ in range(2))
                found = self.eval()(batch)
        except UserError:
            raise
        except Exception as error:
            warnings.warn(
                f"{type(self.model).__name__} could not be run on a small graph of random rows "
                f"({type(error).__name__}: {error}), so that it is not known whether a mini-batch has what its outputs "
                "depend on",
                stacklevel=2,
            )
            return
        finally:
            for module, mode in modes.items():
                module.training = mode
        share = differing_share(wanted, again, found)
        if share:
            warnings.warn(
                f"{type(self.model).__name__} gives other outputs on the in-neighbourhoods of some nodes than on the "
                f"whole graph that they are of (by {share:.1%} on a small one): degrees that it counts by itself, "
                "out-edges, or numbers of nodes or layers, which a mini-batch does not have. Predictions will not be "
                "those of best_model() on the whole graph",
                stacklevel=2,
            )

    def _run(self, x: Tensor, edges: LayerEdges, arguments: dict[str, Any]) -> Any:
        if "edge_weight" in self._takes and (self._wants_weight or edges.edge_weight is not None):
            arguments = arguments | {"edge_weight": edges.edge_weight}
        with self._norm.of(edges):
            return self.model(x, edges.edge_index, **arguments)

    def _can_trim(self, joined: JoinedLayers) -> bool:
        """Whether PyG's models may drop rows between layers: not where all layers' rows meet at the end."""
        depth = getattr(self.model, "num_layers", 1)
        return getattr(self.model, "jk_mode", None) is None and depth <= len(joined.edges_per_hop)

    def _adapt(self, name: str, module: nn.Module) -> None:
        conv: Any = module
        kind = pyg_name(module, *TAKES_COEFFICIENTS)
        shown = f"{type(module).__name__}{f' {name}' if name else ''}"
        if any(isinstance(hook, WholeGraphNorm) for hook in module._forward_pre_hooks.values()):
            raise UserError(f"{shown} is in a PyGModel already; use that one, or a copy by its plain()")
        check_sampled(module, shown)
        if kind is not None and conv.normalize:
            if {"x", "edge_index", "edge_weight"} - places_of(conv).keys():
                raise UserError(
                    f"{shown} normalises by the degrees of the edges that it sees, which are a sample here, and its "
                    "forward takes no edge_weight; let it take one, or make it with normalize=False"
                )
            self._set(conv, "normalize", False)
            conv.register_forward_pre_hook(self._norm, with_kwargs=True)
        if getattr(conv, "cached", False) and pyg_name(module, "MessagePassing"):
            self._set(conv, "cached", False)
        for cache in ("_cached_edge_index", "_cached_adj_t"):
            if getattr(conv, cache, None) is not None:
                setattr(conv, cache, None)

    def _set(self, module: nn.Module, name: str, value: Any) -> None:
        self._kept.append((module, name, getattr(module, name)))
        setattr(module, name, value)


def differing_share(wanted: Tensor, again: Tensor, found: Tensor) -> float:
    """Return by what share of the largest output others differ, 0 within rounding. again: a second run's outputs;
    where these are others, or not finite, nothing is told, and 0 is returned."""
    if not torch.equal(wanted, again) or found.shape != wanted.shape or not bool(wanted.isfinite().all()):
        return 0.0
    scale = float(wanted.abs().max())
    share = float((found - wanted).abs().max()) / scale if scale else 0.0
    return share if share > max(TOLERANCE, 8 * torch.finfo(wanted.dtype).eps) else 0.0


def takes_edges(module: nn.Module) -> bool:
    """Whether a module is one of PyG's kind, whose forward takes (x, edge_index) and not a GraphBatch.

    Raises UserError for one that wants several arguments of which the second is no graph.
    """
    parameters = _parameters(module)
    if parameters is None:
        return False
    places = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if len(places) > 1 and places[1].name in EDGE_NAMES:
        return True
    required = _required(parameters)
    if len(required) > 1:
        raise UserError(
            f"{type(module).__name__}.forward wants ({', '.join(p.name for p in required)}), and a module gets a "
            "batch; write forward(batch: dngd.GraphBatch), or forward(x, edge_index) as PyG's models have it"
        )
    return False


def _parameters(module: nn.Module) -> list[inspect.Parameter] | None:
    """Return the arguments of a module's forward; None where they cannot be told."""
    if pyg_name(module, "Sequential"):
        # Its forward(*args) gives them the names that it was made with.
        names: Any = getattr(getattr(module, "signature", None), "param_dict", {})
        return [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in names]
    try:
        return list(inspect.signature(module.forward).parameters.values())
    except (TypeError, ValueError):
        return None


def _required(parameters: list[inspect.Parameter]) -> list[inspect.Parameter]:
    return [p for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]


PREFIX = "model."


def _without_prefix(module: nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any]) -> None:
    """Give a state dict the names that the model itself has."""
    for name in [name for name in state if name.startswith(prefix + PREFIX)]:
        state[prefix + name.removeprefix(prefix + PREFIX)] = state.pop(name)


def _with_prefix(module: nn.Module, state: dict[str, Any], prefix: str, *others: Any) -> None:
    for name in [name for name in state if name.startswith(prefix)]:
        state[prefix + PREFIX + name.removeprefix(prefix)] = state.pop(name)


def small_batch(num_features: int, num_layers: int, *, weighted: bool) -> tuple[GraphBatch, Tensor, Tensor]:
    """Return a few seeds' whole in-neighbourhoods in a directed graph of 60 nodes; that graph's rows and edges."""
    num_nodes, num_seeds = 60, 4
    generator = torch.Generator("cpu").manual_seed(0)
    targets = torch.randint(num_nodes, (2 * num_nodes,), generator=generator)
    sources = torch.randint(num_nodes, (2 * num_nodes,), generator=generator)
    edge_index = torch.stack([sources, targets])[:, sources != targets]
    edge_index = torch.unique(edge_index, dim=1)
    sources, targets = edge_index
    degrees = torch.bincount(targets, minlength=num_nodes)
    nodes, layers = torch.arange(num_seeds), []
    place = torch.full((num_nodes,), -1)
    place[nodes] = nodes
    for _ in range(num_layers):
        num_dst = nodes.numel()
        edges = ((place[targets] >= 0) & (place[targets] < num_dst)).nonzero()[:, 0]
        new = torch.unique(sources[edges])
        new = new[place[new] < 0]
        place[new] = torch.arange(num_dst, num_dst + new.numel())
        nodes = torch.cat([nodes, new])
        local = torch.stack([place[sources[edges]], place[targets[edges]]])
        local = local[:, local[1].argsort(stable=True)]
        layers.append((local, num_dst))
    made = tuple(
        LayerEdges(
            local,
            num_src,
            num_dst,
            degrees[nodes[:num_src]],
            degrees[nodes[:num_src]].float(),
            torch.ones(local.shape[1]) if weighted else None,
        )
        for (local, num_dst), num_src in zip(reversed(layers), _sources(layers, nodes.numel()))
    )
    x = torch.randn(num_nodes, num_features, generator=generator)
    return GraphBatch(x[nodes], made, nodes, nodes[:num_seeds]), x, edge_index


def _sources(layers: list[tuple[Tensor, int]], num_nodes: int) -> list[int]:
    """Return each layer's number of sources, input side first: the destinations of the one before it."""
    return [num_nodes, *(num_dst for _, num_dst in reversed(layers[1:]))]
