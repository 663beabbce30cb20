"""`headstart merge`: a fine-tuned run as a checkpoint of its own, from which caches are built like from any other."""

import argparse
from pathlib import Path

from cache_builder.cli_ending import Verbs
from heads import cli_train


def add_verb(verbs: Verbs) -> None:
    """Add `merge`."""
    merge = verbs.add_parser(
        "merge",
        help="a fine-tuned run as a backbone, to build caches with",
        description="Write the run's backbone with the trained weights in it (finetune: all weights, or LoRA; adapters "
        "that depend on what passes them cannot be merged), as a directory that --backbone FAMILY:DIR loads.",
    )
    merge.add_argument("run", type=Path, help="a run directory made by `headstart train finetune`")
    merge.add_argument("--out", type=Path, required=True, help="directory to write; must be new")
    merge.add_argument("--backbone", metavar="FAMILY:CHECKPOINT", help=cli_train.MOVED)
    merge.set_defaults(func=_merge)


def _merge(args: argparse.Namespace) -> None:
    from heads import checkpoint
    from heads.errors import ConfigError
    from heads.live import write_backbone

    head = checkpoint.load(args.run, backbone=args.backbone)
    merged = getattr(head, "merged", None)
    if merged is None:
        raise ConfigError(
            f"{checkpoint.method_name(head)} trains no weights of a backbone that could be merged; finetune does"
        )
    name = head.context.backbone_name
    write_backbone(name, merged(), args.out)
    family = name.partition(":")[0]
    print(f"wrote {args.out}; next: headstart build --backbone {family}:{args.out} --dataset …")
