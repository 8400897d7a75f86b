"""Trace a network; find its channel groups, droppable blocks and layers; compute workloads of policies."""

from autocompress.graph.model_graph import Graph
from autocompress.graph.parts import Block, ChannelGroup, Frozen, Layer, Structure
from autocompress.graph.workloads import Workloads

__all__ = ["Block", "ChannelGroup", "Frozen", "Graph", "Layer", "Structure", "Workloads"]
