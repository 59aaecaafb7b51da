"""Bitsmith fits a trained neural network to the hardware it will run on.

It measures what each layer costs and can lose on the real runtime, searches a per-layer plan inside a budget, and
hands back a model that really runs there, with the proof.

    import bitsmith as bs

    task = bs.Task(calibration=calib, validation=val, test=test, metric=bs.metrics.top1)
    result = bs.optimize(model, task, bs.targets.OnnxRuntime(threads=2), bs.Budget(drop=0.01), folder="out")
"""

from __future__ import annotations

from . import metrics as metrics
from . import searches as searches
from . import sensitivities as sensitivities
from . import targets as targets
from .compare import Drop as Drop
from .compare import Score as Score
from .costs import Costs as Costs
from .data import DataError as DataError
from .data import ModelRunError as ModelRunError
from .data import Unlabelled as Unlabelled
from .deploy import export as export
from .evaluate import evaluator as evaluator
from .explore import Explored as Explored
from .explore import every_technique as every_technique
from .explore import explore as explore
from .export.coded import CodedSize as CodedSize
from .export.coded import coded_sizes as coded_sizes
from .export.program import ExportError as ExportError
from .gradual import Certainty as Certainty
from .learn.choice import LearnedPlan as LearnedPlan
from .learn.choice import LearnedStep as LearnedStep
from .learn.choice import differentiable_search as differentiable_search
from .learn.distil import Distil as Distil
from .learn.finetune import finetune as finetune
from .learn.guide import Guide as Guide
from .learn.history import History as History
from .learn.history import TrainingStep as TrainingStep
from .learn.limits import PrecisionStep as PrecisionStep
from .learn.limits import SizeError as SizeError
from .learn.loop import TrainingError as TrainingError
from .learn.metaplastic import Metaplastic as Metaplastic
from .learn.netadapt import Adapted as Adapted
from .learn.netadapt import AdaptedStep as AdaptedStep
from .learn.netadapt import NetAdaptError as NetAdaptError
from .learn.netadapt import netadapt as netadapt
from .learn.precision import LearnedPrecision as LearnedPrecision
from .learn.precision import learn_precision as learn_precision
from .learn.size import Sizes as Sizes
from .learn.size import learned_sizes as learned_sizes
from .load import load as load
from .model.apply import apply as apply
from .model.apply import plan_of as plan_of
from .model.calibrate import CalibrationError as CalibrationError
from .model.intercept import InterceptionError as InterceptionError
from .model.network import sites as sites
from .numerics.bit_errors import ResistiveBit as ResistiveBit
from .optimize import Optimized as Optimized
from .optimize import optimize as optimize
from .plan import Budget as Budget
from .plan import Plan as Plan
from .plan import PlanError as PlanError
from .prepare._channels import ChannelGroup as ChannelGroup
from .prepare.adaround import AdaRound as AdaRound
from .prepare.channels import PruneChannels as PruneChannels
from .prepare.channels import groups_of_channels as groups_of_channels
from .prepare.channels import prune_channels as prune_channels
from .prepare.correct_bias import CorrectBias as CorrectBias
from .prepare.equalise import Equalise as Equalise
from .prepare.equalise_depthwise import EqualiseDepthwise as EqualiseDepthwise
from .prepare.gptq import Gptq as Gptq
from .prepare.ranges import choose_ranges as choose_ranges
from .prepare.smooth import SmoothQuant as SmoothQuant
from .profile import EdgeRow as EdgeRow
from .profile import Profile as Profile
from .profile import Row as Row
from .profile import profile as profile
from .progress import Progress as Progress
from .quantize import default_steps as default_steps
from .quantize import quantize as quantize
from .report.compose import report as report
from .report.data import Report as Report
from .search import BudgetError as BudgetError
from .search import Evaluation as Evaluation
from .search import Result as Result
from .search import SearchInterrupted as SearchInterrupted
from .search import search as search
from .sensitivity.one_at_a_time import loss_rise as loss_rise
from .sensitivity.one_at_a_time import output_error as output_error
from .site import Edge as Edge
from .site import Format as Format
from .site import Learn as Learn
from .site import Range as Range
from .site import Record as Record
from .site import Site as Site
from .site import UnknownSiteError as UnknownSiteError
from .store import Store as Store
from .store import StoreError as StoreError
from .targets.base import Artifact as Artifact
from .task import Task as Task
from .technique import Cell as Cell
from .technique import MatrixProducts as MatrixProducts
from .technique import No as No
from .technique import PrepareError as PrepareError
from .technique import Step as Step
from .technique import Technique as Technique
from .technique import Wants as Wants
from .techniques.adder import Adder as Adder
from .techniques.binary import Binary as Binary
from .techniques.degree_quant import DegreeQuant as DegreeQuant
from .techniques.fisher import FisherPalettes as FisherPalettes
from .techniques.float_ import Float as Float
from .techniques.int_ import Int as Int
from .techniques.ovsf import Ovsf as Ovsf
from .techniques.palette import Palette as Palette
from .techniques.sparse import Sparse as Sparse
from .techniques.sparse_gpt import SparseGpt as SparseGpt
from .techniques.sparse_paths import InitialisePaths as InitialisePaths
from .techniques.sparse_paths import SparsePaths as SparsePaths
from .techniques.sparse_paths import sparse_paths as sparse_paths
from .techniques.winograd import Winograd as Winograd
from .verify import Check as Check
from .verify import verify as verify

__version__ = "0.1.0"

__all__ = [
    "AdaRound",
    "Adapted",
    "AdaptedStep",
    "Adder",
    "Artifact",
    "Binary",
    "Budget",
    "BudgetError",
    "CalibrationError",
    "Cell",
    "Certainty",
    "ChannelGroup",
    "Check",
    "CodedSize",
    "CorrectBias",
    "Costs",
    "DataError",
    "DegreeQuant",
    "Distil",
    "Drop",
    "Edge",
    "EdgeRow",
    "Equalise",
    "EqualiseDepthwise",
    "Evaluation",
    "Explored",
    "ExportError",
    "FisherPalettes",
    "Float",
    "Format",
    "Gptq",
    "Guide",
    "History",
    "InitialisePaths",
    "Int",
    "InterceptionError",
    "Learn",
    "LearnedPlan",
    "LearnedPrecision",
    "LearnedStep",
    "MatrixProducts",
    "Metaplastic",
    "ModelRunError",
    "NetAdaptError",
    "No",
    "Optimized",
    "Ovsf",
    "Palette",
    "Plan",
    "PlanError",
    "PrecisionStep",
    "PrepareError",
    "Profile",
    "Progress",
    "PruneChannels",
    "Range",
    "Record",
    "Report",
    "ResistiveBit",
    "Result",
    "Row",
    "Score",
    "SearchInterrupted",
    "Site",
    "SizeError",
    "Sizes",
    "SmoothQuant",
    "Sparse",
    "SparseGpt",
    "SparsePaths",
    "Step",
    "Store",
    "StoreError",
    "Task",
    "Technique",
    "TrainingError",
    "TrainingStep",
    "UnknownSiteError",
    "Unlabelled",
    "Wants",
    "Winograd",
    "apply",
    "choose_ranges",
    "coded_sizes",
    "default_steps",
    "differentiable_search",
    "evaluator",
    "every_technique",
    "explore",
    "export",
    "finetune",
    "groups_of_channels",
    "learn_precision",
    "learned_sizes",
    "load",
    "loss_rise",
    "metrics",
    "netadapt",
    "optimize",
    "output_error",
    "plan_of",
    "profile",
    "prune_channels",
    "quantize",
    "report",
    "search",
    "searches",
    "sensitivities",
    "sites",
    "sparse_paths",
    "targets",
    "verify",
]
