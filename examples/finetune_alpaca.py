"""Fine-tune a causal language model on a compact part of an instruction set, with Lightning and the recipe of LIMA.

python examples/finetune_alpaca.py --model MODEL --data alpaca_data.json --keep-ratio 0.1 --encoder ENCODER --output tuned
python examples/finetune_alpaca.py --model MODEL --data alpaca_data.json --rows rows.npy --output tuned
python examples/finetune_alpaca.py --model MODEL --data alpaca_data_dq_1k.json --held-out-data alpaca_data.json --output tuned
torchrun is not needed: --devices 8 --strategy fsdp shards the model over eight GPUs.

The first line does all at once: the rows are embedded by ENCODER (a name or folder of transformers, an OpenAI model, or a .npy
of ready-made embeddings, one row for each row of the file), put into bins, sampled, cached and tokenized by the data module.
The last one trains on all rows of a file, and measures the loss on rows of another.
The model and its tokenizer are a name or folder of transformers; the result is such a folder again. Defaults are the published
ones: 9 epochs, batches of 4, 4 of them a step, AdamW (0.9, 0.95), weight decay 0.1, 8e-6 falling linearly, bf16, tf32. The
weights are float32, in training and in the result, in whatever precision the checkpoint is stored.
"""

import argparse
import json
import shlex
from pathlib import Path

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import FSDPStrategy
from transformers import AutoModelForCausalLM, AutoTokenizer, get_linear_schedule_with_warmup

from dq_lightning import QuantizeConfig, QuantizedDataModule
from dq_lightning.core.config import TextConfig
from dq_lightning.core.errors import DQError
from dq_lightning.sources import jsonl
from dq_lightning.tokens.batches import make_token_loader
from dq_lightning.tokens.rows import IGNORED, encode_rows
from dq_lightning.tokens.tokenizer import padding_id


class FineTuner(L.LightningModule):
    """Any causal language model of transformers; the loss is over the tokens that have labels."""

    def __init__(self, model: str, learning_rate: float, weight_decay: float, vocabulary: int = 0) -> None:
        super().__init__()
        self.save_hyperparameters()
        # The optimizer changes float32 weights; --precision says in what the network computes. In the half precision that most
        # checkpoints are stored in, a step of 8e-6 is rounded away (bfloat16) or ends in NaN (float16).
        self.network = AutoModelForCausalLM.from_pretrained(model, trust_remote_code=False, dtype=torch.float32)
        self.network.train()  # transformers loads for inference, without dropout
        self.network.config.use_cache = False
        embedded = self.network.get_input_embeddings().num_embeddings
        if vocabulary > embedded:
            print(f"the tokenizer has {vocabulary:,} tokens, the model embeds {embedded:,}: new rows are added to it")
            self.network.resize_token_embeddings(vocabulary)

    def training_step(self, batch, batch_index):
        loss = self.network(**batch).loss
        if not torch.isfinite(loss):
            raise SystemExit(
                f"the loss is {float(loss)} at step {self.trainer.global_step:,}, so the model is lost and nothing is saved: "
                "lower --learning-rate, or pass --precision bf16-mixed or 32-true"
            )
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch, batch_index):
        # the mean over tokens, not over batches: weigh by the labels that are predicted
        count = int((batch["labels"][:, 1:] != IGNORED).sum())
        self.log("held_out_loss", self.network(**batch).loss, batch_size=count, on_epoch=True, sync_dist=True)

    def configure_optimizers(self):
        settings = self.hparams
        optimizer = torch.optim.AdamW(
            self.parameters(), settings.learning_rate, betas=(0.9, 0.95), weight_decay=settings.weight_decay
        )
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = get_linear_schedule_with_warmup(optimizer, num_warmup_steps=0, num_training_steps=steps)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


class InstructionData(L.LightningDataModule):
    """Token batches over the rows of a training set and over held-out rows."""

    def __init__(self, train: list, held_out: list, tokenizer, args: argparse.Namespace) -> None:
        super().__init__()
        self.tokenizer, self.args = tokenizer, args
        self.train = encode_rows(train, tokenizer, max_length=args.max_length)
        self.held_out = encode_rows(held_out, tokenizer, max_length=args.max_length)

    def train_dataloader(self):
        return make_token_loader(
            self.train,
            pad_id=padding_id(self.tokenizer),
            batch_size=self.args.batch_size,
            seed=self.args.seed,
            packing=self.args.packing,
        )

    def val_dataloader(self):
        size = self.args.eval_batch_size
        return make_token_loader(self.held_out, pad_id=padding_id(self.tokenizer), batch_size=size, shuffle=False)


def make_data(tokenizer, args: argparse.Namespace) -> L.LightningDataModule:
    """The data module of this run: the chosen rows of the file, and held-out ones that are not among them."""
    rows = read_rows(args.data)
    others = read_rows(args.held_out_data) if args.held_out_data else rows
    chosen = np.arange(len(rows)) if args.rows is None else np.load(args.rows, allow_pickle=False)
    if args.keep_ratio is not None:
        return quantized_data(rows, others, tokenizer, args)
    used = {json.dumps(rows[i], sort_keys=True) for i in chosen.tolist()}
    # one order for all runs, so that subsets are measured on the same rows; copies of training rows are passed over
    order = np.random.default_rng(0).permutation(len(others)).tolist()
    unseen = (i for i in order if json.dumps(others[i], sort_keys=True) not in used)
    held_out = [others[i] for i, _ in zip(unseen, range(args.held_out), strict=False)]
    if not held_out:
        raise SystemExit(
            "all rows are in the training set, so none are left to measure the loss on: "
            "pass --rows with some of them, or --held-out-data alpaca_data.json"
        )
    print(f"{len(chosen):,} training rows, {len(held_out):,} held out")
    return InstructionData([rows[i] for i in chosen.tolist()], held_out, tokenizer, args)


def quantized_data(rows: list[dict], others: list[dict], tokenizer, args: argparse.Namespace) -> QuantizedDataModule:
    """The whole flow over the rows of the file; held-out rows are taken away before it."""
    order = np.random.default_rng(0).permutation(len(others))[: args.held_out]
    held_out = {json.dumps(others[i], sort_keys=True) for i in order.tolist()}
    pool = [i for i, row in enumerate(rows) if json.dumps(row, sort_keys=True) not in held_out]
    # embeddings of all rows are cut down to those that may be trained on
    encoder = np.load(args.encoder, mmap_mode="r")[pool] if args.encoder.endswith(".npy") else args.encoder
    return QuantizedDataModule(
        [rows[i] for i in pool],
        val=[others[i] for i in order.tolist()],
        keep_ratio=args.keep_ratio,
        encoder=encoder,
        tokenizer=tokenizer,
        config=QuantizeConfig(text=TextConfig(train_length=args.max_length, pack_rows=args.packing)),
        batch_size=args.batch_size,
        eval_batch_size=args.eval_batch_size,
        seed=args.seed,
    )


def read_rows(path: Path) -> list[dict]:
    """Rows of a JSON list or of JSON lines, packed by xz, gz, bz2 or not."""
    try:
        return jsonl.read_rows(path)
    except DQError as error:
        raise SystemExit(str(error)) from error


def make_strategy(args: argparse.Namespace, network: torch.nn.Module):
    """`fsdp` shards every decoder layer by itself, as the published command does for LlamaDecoderLayer."""
    if args.strategy != "fsdp":
        return args.strategy
    return FSDPStrategy(auto_wrap_policy=decoder_layers(network), state_dict_type="full")


def decoder_layers(network: torch.nn.Module) -> set[type]:
    """The classes of the model's repeated blocks, which transformers names in every model."""
    names = set(network._no_split_modules or [])
    found = {type(module) for module in network.modules() if type(module).__name__ in names}
    if not found:
        raise SystemExit(
            f"{type(network).__name__} has no layers of the decoder that FSDP could wrap: pass --strategy ddp"
        )
    return found


def save(trainer: L.Trainer, module: FineTuner, tokenizer, folder: Path) -> None:
    """Write a folder of transformers; with FSDP the shards are gathered on rank 0."""
    state = trainer.strategy.lightning_module_state_dict()
    if not trainer.is_global_zero:
        return
    if lost := [name for name, value in state.items() if not value.isfinite().all()]:
        raise SystemExit(
            f"{len(lost)} of {len(state)} tensors are not finite after the last step ({lost[0]}), so nothing is saved: lower "
            "--learning-rate, or pass --precision bf16-mixed or 32-true"
        )
    names = {name.removeprefix("network."): value for name, value in state.items()}
    module.network.config.use_cache = True
    module.network.save_pretrained(folder, state_dict=names)
    tokenizer.save_pretrained(folder)
    print(
        f"saved: {folder}\nevaluate it with lm-evaluation-harness (pip install 'lm_eval[hf]'):\n"
        f"  lm_eval --model hf --model_args {shlex.quote(f'pretrained={folder}')} --tasks mmlu,bbh,drop --num_fewshot 3\n"
        "or with instruct-eval:\n"
        f"  python main.py mmlu --model_name causal --model_path {shlex.quote(str(folder))}"
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="name or folder of a causal language model of transformers")
    parser.add_argument("--data", type=Path, required=True, help="Alpaca JSON or JSON lines, or either with .xz")
    parser.add_argument("--rows", type=Path, help=".npy of the rows to train on; all rows if left out")
    parser.add_argument(
        "--keep-ratio", type=float, help="quantize the file to this share of its rows, in place of --rows"
    )
    parser.add_argument(
        "--encoder", default="auto", help="with --keep-ratio: the encoder of the rows, or .npy of embeddings"
    )
    parser.add_argument("--held-out", type=int, default=500, help="rows that the loss is measured on, never trained on")
    parser.add_argument("--held-out-data", type=Path, help="another file that these rows are taken from")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=9)
    parser.add_argument("--batch-size", type=int, default=4, help="rows of a batch on each device")
    parser.add_argument("--eval-batch-size", type=int, default=2)
    parser.add_argument("--accumulate", type=int, default=4, help="batches of a step")
    parser.add_argument("--learning-rate", type=float, default=8e-6)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--max-length", type=int, default=512, help="tokens of a row")
    parser.add_argument("--packing", action="store_true", help="several rows in one sequence")
    parser.add_argument("--precision", default="bf16-mixed")
    parser.add_argument("--strategy", default="auto", help="auto, ddp or fsdp")
    parser.add_argument("--devices", default="auto")
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-steps", type=int, default=200, help="steps between two checkpoints")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in OUTPUT/checkpoints")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser.parse_args()


def main() -> dict[str, float]:
    args = parse()
    L.seed_everything(args.seed, verbose=False)
    torch.set_float32_matmul_precision("high")  # tf32
    tokenizer = AutoTokenizer.from_pretrained(args.model, trust_remote_code=False)
    data = make_data(tokenizer, args)
    vocabulary = max(tokenizer.get_vocab().values()) + 1
    module = FineTuner(args.model, args.learning_rate, args.weight_decay, vocabulary)
    trainer = L.Trainer(
        max_epochs=args.epochs,
        accumulate_grad_batches=args.accumulate,
        precision=args.precision,
        strategy=make_strategy(args, module.network),
        devices=args.devices,
        accelerator=args.accelerator,
        default_root_dir=args.output,
        callbacks=[
            # the newest ten: steps never fall
            ModelCheckpoint(
                dirpath=args.output / "checkpoints",
                every_n_train_steps=args.save_steps,
                save_top_k=10,
                monitor="step",
                mode="max",
                save_last="link",
                enable_version_counter=False,
            )
        ],
        logger=False,
        num_sanity_val_steps=0,
        enable_progress_bar=not args.quiet,
        enable_model_summary=not args.quiet,
    )
    trainer.validate(module, data, verbose=False)
    before = float(trainer.callback_metrics["held_out_loss"])
    trainer.fit(module, data, ckpt_path="last" if args.resume else None)
    after = float(trainer.callback_metrics["held_out_loss"])
    if trainer.is_global_zero:
        print(f"held-out loss per token: {before:.4f} before, {after:.4f} after {trainer.global_step:,} steps")
    save(trainer, module, tokenizer, args.output)
    return {"untrained": before, "tuned": after}


if __name__ == "__main__":
    main()
