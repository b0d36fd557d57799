"""Every configuration key, with its default, unit and meaning.

The defaults are the main experiment of KDRL (arXiv 2506.02208, section 4) as far as the paper
states it. Other files call `get_config()` here and change a few keys; anything may be changed on
the command line: `--config.optimizer.learning_rate=3e-6`. No other file holds a default. A file
may also name sets of changes in `VARIANTS`; `--config=configs/stage2.py:k3` applies one.
"""

from ml_collections import ConfigDict


def model(**overrides) -> ConfigDict:
    """The keys of one model role, student or teacher."""
    c = ConfigDict()
    # A Hugging Face folder, a run's folder (its newest checkpoint), or a model of the Hugging Face
    # hub, OWNER/NAME or OWNER/NAME@REVISION, which is downloaded once. 'A or B': the first that is
    # a folder with a model in it, else the last. "" builds `shape` with random weights.
    c.path = ""
    # Used only where path is "": a model of this shape, with the embedded SentencePiece tokenizer;
    # and by `kdrl_jax.plan`. configs/shapes.py has those of published models.
    c.shape = ConfigDict()
    c.shape.model_type = "qwen3"  # qwen2 | qwen3 | llama
    c.shape.hidden_size = 128
    c.shape.num_layers = 4
    c.shape.num_heads = 4
    c.shape.num_kv_heads = 2
    c.shape.head_dim = 32
    c.shape.mlp_size = 384
    c.shape.vocab_size = 0  # rows of the embedding; 0: as the tokenizer needs
    c.shape.tie_embeddings = True  # False: an output head of its own
    # Supervised warm-up on the task's worked solutions; 0 steps: none.
    # The result is kept under cache_dir and reused by every run with the same keys.
    c.sft = ConfigDict()
    c.sft.steps = 0
    c.sft.batch_size = 128  # sequences per step
    c.sft.learning_rate = 1e-3  # peak; cosine to a tenth, 5 % warm-up
    c.sft.task = ""  # whose worked solutions; "": data.task
    c.sft.problems = 20_000  # drawn from the task
    c.sft.seed = 0
    # float32 | bfloat16, of activations and matmuls; softmax, norms and logits are float32. A
    # teacher may also be int8: bfloat16 with the weights of its layers kept in 8 bits.
    c.dtype = "bfloat16"
    c.remat = "full"  # what the backward pass recomputes: none | dots | full
    c.update(overrides)
    return c


def mesh(**sizes) -> ConfigDict:
    """Sizes of the mesh axes: at most one is -1 and takes what is left of the devices."""
    return ConfigDict({**sizes, "devices": ""})  # "": all; "0:48": those, in the order JAX has


def get_config() -> ConfigDict:
    c = ConfigDict()
    c.seed = 0
    c.steps = 280  # rollout batches; each makes mini_batches · epochs updates
    c.cache_dir = "runs/cache"  # warmed-up models and compiled programs; shared by runs
    # True: nothing is asked of the network: hf:// data from the hub's cache alone, a rollout server
    # on this machine alone, and any other connection that Python makes is an error.
    c.offline = False
    # True: slower, and stops at the first thing that is not as it should be: NaN where it arises,
    # records that break their invariants between two phases, arrays of another shape than declared.
    c.debug = False

    # --- the objective: J = J_policy − β·D(student‖teacher) -----------------------------------
    # kdrl | grpo (no teacher loaded) | kd_rkl (no policy term) | reward_shaping (rewards minus
    # β·Σℓ, then GRPO) | trrd (RLAD: the teacher within the ratio) | sft (on the teacher's right
    # answers: it answers every problem group_size times before the first step, and each step takes
    # prompts_per_step · group_size of the right ones, in shuffled epochs)
    c.objective = "kdrl"
    c.sft_problems = 0  # of sft: problems that the teacher answers; 0: all
    c.kd_estimator = "k2"  # k2 (½ℓ², the paper's) | k3 | k1 (score-function form) | topk | full
    c.kd_topk = ConfigDict()
    c.kd_topk.k = 50  # tokens of the support; the paper does not say how many
    # floor: the paper's, the teacher has exp(log_floor) outside its top k, and the student keeps
    # its whole vocabulary | teacher: both renormalised on the teacher's top k | student: on the
    # student's | tail: the teacher's top k, and one bucket for the rest
    c.kd_topk.support = "floor"
    c.kd_topk.log_floor = -18.42  # nats, ln 1e-8; of "floor"
    c.k3_clamp = 0.0  # nats; the term of k3 is at most this, as in verl (10); 0: no bound
    c.kd_mask = "none"  # response (KD where it is wrong) | group (… whole group wrong) | none
    c.beta = ConfigDict()
    # constant: init | linear: max(init − delta·step, min) | adaptive: falls with the KL and where
    # rewards stall, delta a step, never below min | phases
    c.beta.schedule = "linear"
    c.beta.init = 5e-3
    c.beta.min = 1e-3
    c.beta.delta = 5e-5  # per step
    c.beta.phases = ()  # ((0, 1e-2), (100, 0.0)): the value from these steps on
    c.policy_phases = ()  # likewise the weight of the policy term; (): 1 throughout
    c.trrd = ConfigDict()
    # Of the log-ratio, alpha is taken to the old student and 1 − alpha to the teacher. 1: GRPO; 0:
    # the ratio to the teacher alone, as the log-ratio to the reference in DPO.
    c.trrd.alpha = 0.5
    c.trrd.alpha_end = 1.0  # alpha moves to this in a straight line over alpha_steps steps
    c.trrd.alpha_steps = 0  # 0: alpha stays as it is
    c.trrd.clamp = 1.0  # nats, of the log-ratio to the teacher
    c.trrd.clamp_gradient = "clamp"  # clamp (none beyond it) | straight_through
    c.reference_coef = 0.0  # of the KL to the initial student (k3); stage 1 of the paper: 1e-3
    c.aggregation = "group-token-mean"  # also: token-mean, seq-mean-token-mean, …-token-sum-norm
    c.advantage = ConfigDict()
    c.advantage.scale = "group"  # divide by the std of: group | batch | none (Dr. GRPO)
    c.advantage.baseline = "mean"  # mean | leave_one_out (RLOO) | none (REINFORCE)
    c.clip_eps_low = 0.2  # ratio clip; GRPO's has no effect with one update per rollout batch
    c.clip_eps_high = 0.2  # above clip_eps_low: clip-higher (DAPO)
    c.entropy_coef = 1e-3  # of the entropy bonus
    # Adaptive entropy (Skywork-OR1, arXiv 2505.22312): after each step the coefficient rises by
    # `delta` where the entropy was below `target`, falls by it where it was above, and stays in
    # [0, max]; the bonus is off while the entropy is above the target. entropy_coef is the start.
    c.adaptive_entropy = ConfigDict()
    c.adaptive_entropy.target = 0.0  # nats per token; 0: entropy_coef is constant
    c.adaptive_entropy.delta = 1e-4
    c.adaptive_entropy.max = 5e-3
    c.tis_cap = 0.0  # truncated importance weights, trainer over sampler, at most this; 0: off
    c.mask_truncated = False  # True: responses cut at the limit are not trained on
    c.logprob_temperature = "rollout"  # divides logits in every log-prob: "rollout" or e.g. "1.0"

    # --- models --------------------------------------------------------------------------------
    c.student = model()
    # Low-rank adapters (LoRA, arXiv 2106.09685): the student's weights stay as they are, in
    # student.dtype, and only A and B of W + (alpha / rank) · A·B are trained, in float32. They want
    # about ten times the learning rate. Needs weights that are kept: path or sft.steps.
    c.student.lora = ConfigDict()
    c.student.lora.rank = 0  # of A·B; 0: no adapters, all weights are trained
    c.student.lora.alpha = 32.0
    # Of q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj; all-linear: all of them.
    c.student.lora.targets = ("all-linear",)
    c.teacher = model(remat="none")
    c.teacher.offload = False  # its weights wait in host memory while they are not used
    c.tokenizer = ""  # folder or model of the hub; "": the student's
    # data and fsdp split the batch, fsdp the weights as well; tensor splits heads, MLP and
    # vocabulary; context splits the length of rows that are scored and trained on.
    c.mesh = mesh(data=1, fsdp=-1, tensor=1, context=1)
    # The teacher's own layout, and that of rollouts; 0: as in mesh. With devices of their own,
    # weights and rows are sent there and back.
    c.teacher_mesh = mesh(data=0, fsdp=0, tensor=0, context=0)
    c.rollout_mesh = mesh(data=-1, fsdp=0, tensor=0)
    c.process_timeout_s = 100.0  # a process that gives no sign for so long is lost: the run ends

    # --- data: a task or a data set ------------------------------------------------------------
    c.data = ConfigDict()
    # arithmetic | knights_knaves (prose) | knights_knaves_symbolic | reasoning_gym/NAME |
    # your_module:ATTRIBUTE | "" (then path)
    c.data.task = ""
    c.data.task_args = ""  # a JSON object of arguments for the task: '{"max_terms": 5}'
    c.data.path = ""  # .jsonl, .json, .parquet, a folder or pattern of these, hf://owner/name
    c.data.eval_path = ""  # held-out problems, likewise; "" with a task: its test split
    # Share of the problems of `path` that is held out instead of `eval_path`, at most eval.problems
    # of them; chosen by data.seed and their texts, so none is trained on. 0: none.
    c.data.eval_fraction = 0.0
    c.data.on_bad = "raise"  # a row that cannot be used: raise | drop (counted and listed)
    c.data.filters = ()  # steps of kdrl_jax.data.filters, in order
    c.data.fields = ConfigDict({"id": "id", "problem": "problem", "answer": "answer"})
    # kdrl | zero_rl | chat | plain | your_module:function (problem text → messages or text) |
    # "chat:…{problem}…", a user's turn, or "plain:…{problem}…", the beginning of a text
    c.data.prompt_style = "kdrl"
    c.data.max_prompt_tokens = 1024  # longer prompts are dropped, counted and reported
    # Padded lengths; one compiled program for each. (): 64, 128, … up to max_prompt_tokens
    c.data.prompt_buckets = (256, 512, 1024)
    c.data.size = 100_000  # problems drawn from a task
    c.data.seed = 1  # of the task's problems; held-out problems come from a disjoint split

    # --- rollouts ------------------------------------------------------------------------------
    c.rollout = ConfigDict()
    c.rollout.prompts_per_step = 64  # problems of a rollout batch
    c.rollout.group_size = 16  # samples per prompt
    c.rollout.max_new_tokens = 20_480  # of a completion; longer ones are cut
    c.rollout.temperature = 0.6
    c.rollout.top_p = 1.0  # 1: off
    c.rollout.top_k = 0  # 0: off
    c.rollout.min_p = 0.0  # 0: off
    # Requests that decode at once, over all devices; a request that ends leaves its slot to the
    # next. Changes memory, speed and rounding alone. 0: all of a rollout batch, fewer as they end.
    c.rollout.slots = 0
    # Problems sampled beyond prompts_per_step: a step begins when as many as that are done, and the
    # others go on in the next one (partial rollouts, arXiv 2501.12599). Their tokens keep
    # the log-probs they were drawn with, which the ratio is then taken to. Which ones are done
    # first depends on rollout.slots. 0: wait for all.
    c.rollout.carry = 0
    c.rollout.dtype = ""  # "": the student's. Another one costs what mismatch/kl says
    # Dynamic sampling (DAPO): groups that are all right or all wrong are dropped and replaced from
    # at most so many more rollout batches a step.
    c.rollout.refill = 0
    # A vLLM or SGLang server draws instead, of the student's own model, and is given its weights
    # before each step. Its API key, if any, is taken from the environment: KDRL_SERVER_KEY.
    c.rollout.server = ConfigDict()
    c.rollout.server.url = ""  # "http://host:port"; "": this process draws
    c.rollout.server.kind = "vllm"  # vllm | sglang
    c.rollout.server.model = ""  # the name that vLLM serves it by; SGLang needs none
    c.rollout.server.weights = ""  # folder that both see under this path; "": in the workdir
    c.rollout.server.concurrency = 256  # requests in flight
    c.rollout.server.timeout_s = 1800.0  # of one request, with its retries

    # --- reward --------------------------------------------------------------------------------
    c.reward = ConfigDict()
    # What the answer of a response is, for grading, masks, refill and evaluation alike: boxed (in
    # the last \boxed{}) | last_number (1,234.5, 3/4, 50%, -$5, …) | text (all of it) | task (what
    # the task's own `answer` finds). The middle two leave out what precedes </think>.
    c.reward.answer = "boxed"
    # The reward of training: format × accuracy, where the format is <think>…</think>, then the
    # answer; False: accuracy alone.
    c.reward.require_format = True
    c.reward.workers = 4  # verification processes
    c.reward.timeout_s = 3.0  # a hard limit per answer or call, then the worker is killed
    # Rewards of your own, added to the verifier's: ("my_rewards:brevity*0.2", …), each
    # module:function or module:function*weight. See kdrl_jax/rewards/functions.py. What is right,
    # for masks, refill and accuracy, stays the verifier's to say.
    c.reward.functions = ()
    c.reward.verdict_weight = 1.0  # of the verifier's 0 or 1 in the reward
    c.reward.overlong_buffer = 0  # last tokens of the budget, punished linearly (DAPO); 0: off
    c.reward.overlong_penalty = 1.0  # at the end of the budget

    # --- update --------------------------------------------------------------------------------
    c.optimizer = ConfigDict()
    c.optimizer.learning_rate = 1e-6  # of AdamW, after the warm-up
    c.optimizer.warmup_steps = 0  # updates
    c.optimizer.schedule = "constant"  # constant | cosine (to zero at the last step)
    c.optimizer.b1 = 0.9
    c.optimizer.b2 = 0.999
    c.optimizer.eps = 1e-8
    c.optimizer.weight_decay = 0.01
    c.optimizer.clip_norm = 1.0  # of the global gradient
    c.optimizer.offload = False  # moments wait in host memory while no update is made
    c.mini_batches = 1  # updates per pass over a rollout batch; each takes whole groups
    c.epochs = 1  # passes over a rollout batch
    # Rows per forward and backward, over all devices; changes memory, not results. 0: the most that
    # divide the rows of an update and fit the devices by the memory plan.
    c.micro_batch = 64
    c.logprob_chunk = 2048  # tokens whose logits exist at once, on each device
    # GiB of each device that a run may plan with; what does not fit is refused before the start.
    # 0: what the devices report, or on CPU their share of the machine's memory.
    c.memory_gib = 0.0

    # --- health: watches over a run, in words when they trip -----------------------------------
    # Each compares a moving average with a threshold; 0 turns one off. benchmarks/RELIABILITY.md
    # has healthy runs, in which none trips, and failing ones, with what trips in them.
    c.health = ConfigDict()
    # Those that end the run, with a checkpoint and exit code 3: names of
    # kdrl_jax.training.health.WATCHES, or ("all",). Otherwise they are only said and counted.
    c.health.stop = ()
    c.health.window = 10  # steps of the average; no watch but nonfinite trips before
    # nonfinite: an update whose loss or gradient is not finite is skipped; after so many steps in
    # a row the run ends. 0: never.
    c.health.max_skipped = 3
    c.health.reward_frac = 0.6  # reward_collapse: mean reward below this share of its best
    # accuracy_drop: an evaluation below this share of the best; noisy where eval.problems are few
    c.health.accuracy_frac = 0.75
    # no_gain: held-out accuracy, mean of three evaluations, less than this above that of the run in
    # the folder `baseline` at the same steps: GRPO on the same data, say
    c.health.baseline = ""
    c.health.baseline_gain = 0.005
    c.health.length_factor = 2.0  # length_explosion: over so many times the mean of 50 steps
    c.health.length_frac = 0.5  # length_collapse: below this share of the first steps' length
    c.health.truncated_frac = 0.5  # truncation: share of responses cut at the limit
    c.health.entropy_frac = 0.1  # entropy_collapse: below this share of the first steps' entropy
    c.health.repetition_frac = 0.25  # repetition: share of responses cut while looping
    c.health.kl_factor = 1.5  # kl_blowup: KL(student‖teacher) over so many times the first steps'
    c.health.mismatch_kl = 0.05  # mismatch: KL(sampler‖trainer), nats per token
    c.health.no_signal_frac = 0.95  # no_signal: share of groups whose rewards are all equal
    # teacher_ignored: shuffling the teacher's log-probs changes less than this share of the
    # gradient. Measured every so many steps, and at the first; takes the time of two updates.
    c.health.teacher_effect = 1e-5
    c.health.teacher_every = 100

    # --- evaluation, checkpoints, logs ---------------------------------------------------------
    c.eval = ConfigDict()
    c.eval.every = 20  # steps; 0: never. Also before the first step and after the last
    c.eval.problems = 256  # at most
    c.eval.samples = 1  # per problem; eval/accuracy is their mean
    c.eval.batch = 64  # problems decoded at once
    c.eval.temperature = 0.6  # 0: greedy
    c.eval.top_p = 1.0  # 1: off
    # A column of the data, or of a task's `meta`: accuracy by its values as well. "": none.
    c.eval.by = ""
    c.eval.max_new_tokens = 0  # of a response; 0: as in rollout
    c.eval.require_format = False  # True: a right answer counts only in reward's format
    c.checkpoint = ConfigDict()
    c.checkpoint.every = 20  # steps; the last step is always saved
    c.checkpoint.keep = 3
    c.samples = ConfigDict()
    # Steps between files of sample rollouts, which the first and the last step write, too; 0: none.
    c.samples.every = 10
    c.samples.count = 16  # rollouts per file
    # The scalars of metrics.jsonl in Weights & Biases as well (extra `wandb`). Its own variables,
    # such as WANDB_API_KEY, WANDB_MODE and WANDB_BASE_URL, say the rest; offline=True keeps the
    # data in the workdir.
    c.wandb = ConfigDict()
    c.wandb.project = ""  # "": off
    c.wandb.entity = ""  # user or team; "": the account's own
    c.wandb.name = ""  # of the run; "": the workdir's
    return c.lock()  # another name than these is an error where it stands
