"""What the front door says of its words, without importing what they run."""

from __future__ import annotations

TASK_HELP = "part of the shards to write, 0/N to N-1/N (default: this process's part of its SLURM array, else all)"

OPTIONS = """\
-c FILE               an experiment; may be given several times, later files win
--a.b.c VALUE         one setting, over all files, in every stage
--stages.NAME.a.b VALUE   the same for one stage
--stage NAME          run this stage only
--fresh               start over; the old run is moved aside, not deleted
--experiment NAME     name of the run folder (default: the name of the first file)
--run_root DIR        where run folders live (default: runs)
--prompt TEXT, --style FILE, ...   (predict) fill the model's lists `prompts`, `styles`, ...
--smoke               two small steps of every stage, in runs/smoke, to see that all of it works
--print_config        print the merged settings of every stage and stop
--help                this text, and every setting with its meaning
"""

FILE_KEYS = """\
keys of an experiment file:
  description: TEXT   one line for `list`
  base: [FILES]       files merged before this one, relative to it
  experiment: NAME    name of the run folder
  run_root: DIR       where run folders live
  stages: {NAME: SETTINGS, ...}   run in order, each merged over the rest of the file and started
                      from the weights of the stage before
  init_from: FILE     checkpoint whose weights a run starts from; null for none
  validate_first: BOOL    validate before training too, kept as "before" in metrics.json
  vars: {NAME: VALUE}     free values for ${vars.NAME}
  smoke: SETTINGS     merged over all others by --smoke; a stage that is null there is left out
  sweep: {...}        arms and seeds of `python -m lit_gen sweep -c FILE`
  checkpoint: {...}   how often to save and what to keep
  speed: {peak_tflops: X}     what the device can do, to show the share of it in use (MFU)
  seed_everything, trainer, model, data   as in Lightning's command line
  NAME+: [ITEMS]      appends to a list that another file gave, e.g. `callbacks+:`
"""

CACHE = f"""\
usage: python -m lit_gen cache -c FILE [--stage NAME] [--a.b.c VALUE] [options]

Encodes what the training steps of each stage would compute from its training sets with the same result each time
(Stable Diffusion: latents and text states) into shards beside those sets. Train from them with
`--data.init_args.cached float16`, or `cached: float16` in the file.

  --dtype float16|float32   precision to store, where the data do not say `cached` (default: float16)
  --batch_size N            samples encoded at a time (default: the data's batch_size)
  --device cpu|cuda|cuda:N  where to encode (default: all GPUs, if any, one process each)
  --workers N               processes that encode on the CPU (default: 1)
  --task I/N                {TASK_HELP}
"""

CHECK = f"""\
usage: python -m lit_gen check -c FILE [options]

Says in seconds, without a GPU, what would go wrong: binds every setting, opens every set, builds the model without its
weights, estimates memory and disk. Returns 2 if there are problems.

{OPTIONS}"""

EXPORT = """\
usage: python -m lit_gen export -c FILE [--stage NAME] [--a.b.c VALUE] [options]

Writes what a stage trained, the last one unless --stage names one.

  --format safetensors|checkpoint   weights.safetensors and the method's own layout (the default), averaged weights if
                                    there are any; or checkpoint.ckpt, which any strategy but ZeRO continues from
  --out DIR                         where to (default: export/ in the run folder)
  --ckpt_path FILE                  of this checkpoint (default: the newest of the run)
"""

LIST = """\
usage: python -m lit_gen list [FOLDER]

Names the experiments below a folder (default: experiments/), with a line on each.
"""

OF = {"cache": CACHE, "check": CHECK, "export": EXPORT, "list": LIST}
