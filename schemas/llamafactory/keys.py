"""LLaMA-Factory's keys (0.9) that become no setting: already so here, ignored, or refused.

Keys that become settings are in `settings.py` and `training.py`. A key that is nowhere is unknown.
"""

from typing import Any

IMPLIED: dict[str, str] = {
    **dict.fromkeys(("do_train",), "a run trains"),
    **dict.fromkeys(
        ("do_eval", "do_predict", "predict_with_generate", "compute_accuracy", "eval_on_each_dataset"),
        "each run answers the held-out rows with base and fine-tuned model and compares them",
    ),
    **dict.fromkeys(("plot_loss", "logging_first_step"), "MLflow has the curves of every run"),
    **dict.fromkeys(
        ("logging_steps", "logging_strategy", "logging_dir", "disable_tqdm", "log_level"), "every step is logged"
    ),
    **dict.fromkeys(
        ("overwrite_output_dir", "resume_from_checkpoint", "auto_resume"),
        "the same command goes on with an interrupted run; a finished one is never overwritten",
    ),
    **dict.fromkeys(
        ("overwrite_cache", "data_shared_file_system"), "the cache knows when data, settings or code changed"
    ),
    **dict.fromkeys(
        (
            "preprocessing_num_workers",
            "preprocessing_batch_size",
            "dataloader_num_workers",
            "dataloader_pin_memory",
            "dataloader_persistent_workers",
            "dataloader_prefetch_factor",
            "buffer_size",
            "low_cpu_mem_usage",
            "use_fast_tokenizer",
            "per_device_eval_batch_size",
            "eval_accumulation_steps",
            "batch_eval_metrics",
        ),
        "chosen by the machine: its cores and free memory",
    ),
    **dict.fromkeys(("ddp_timeout", "ddp_find_unused_parameters", "ddp_backend", "local_rank"), "set by the launcher"),
    **dict.fromkeys(
        (
            "bf16",
            "fp16",
            "bf16_full_eval",
            "fp16_full_eval",
            "tf32",
            "infer_dtype",
            "upcast_layernorm",
            "upcast_lmhead_output",
        ),
        "training.precision auto: bf16 where the GPU has it, with what is trained and sums in fp32",
    ),
    **dict.fromkeys(("trust_remote_code",), "no code of a model is run; a model that needs it is refused"),
    **dict.fromkeys(
        (
            "flash_attn",
            "enable_liger_kernel",
            "use_unsloth",
            "use_unsloth_gc",
            "use_reentrant_gc",
            "use_kv_cache",
            "use_v1_kernels",
        ),
        "training.engine auto: the fused engine where it knows the model",
    ),
    **dict.fromkeys(
        (
            "group_by_length",
            "train_sampling_strategy",
            "length_column_name",
            "remove_unused_columns",
            "pad_to_multiple_of",
        ),
        "the order is drawn by the seed, and padding costs nothing",
    ),
    **dict.fromkeys(("ignore_pad_token_for_loss",), "padding is never trained"),
    **dict.fromkeys(("greater_is_better",), "a smaller evaluation loss is better"),
    **dict.fromkeys(
        ("save_only_model", "save_safetensors", "save_strategy", "save_on_each_node"),
        "checkpoints are whole and safetensors",
    ),
    **dict.fromkeys(
        (
            "include_effective_tokens_per_second",
            "include_num_input_tokens_seen",
            "include_tokens_per_second",
            "print_param_status",
        ),
        "MLflow has tokens a second, memory and the number of parameters",
    ),
    **dict.fromkeys(
        ("cache_dir", "hf_hub_token", "ms_hub_token", "om_hub_token"), "set HF_HOME and HF_TOKEN in the environment"
    ),
    **dict.fromkeys(("double_quantization",), "nf4 weights have quantized scales"),
    **dict.fromkeys(("data_seed", "full_determinism"), "the seed decides about everything that is drawn"),
    **dict.fromkeys(
        ("fsdp_config", "adapter_folder", "loraplus_lr_embedding", "pissa_iter", "init_special_tokens"),
        "of no effect here",
    ),
    **dict.fromkeys(
        (
            "freeze_vision_tower",
            "freeze_multi_modal_projector",
            "freeze_language_model",
            "media_dir",
            "image_max_pixels",
            "image_min_pixels",
            "video_max_pixels",
            "video_min_pixels",
            "video_fps",
            "video_maxlen",
        ),
        "of no effect with texts",
    ),
    **dict.fromkeys(
        ("enable_thinking", "preserve_thinking"),
        "the chat template decides where thoughts stand, with the arguments that were saved with it in training",
    ),
    **dict.fromkeys(
        (
            "eval_num_beams",
            "num_beams",
            "length_penalty",
            "skip_special_tokens",
            "max_length",
            "do_sample",
            "temperature",
        ),
        "answers are greedy",
    ),
    **dict.fromkeys(("export_legacy_format", "export_device"), "safetensors, merged block by block on the CPU"),
    **dict.fromkeys(("infer_backend",), "transformers answers"),
    **dict.fromkeys(
        (
            "half_precision_backend",
            "fp16_backend",
            "fp16_opt_level",
            "use_ipex",
            "jit_mode_eval",
            "torchdynamo",
            "torch_compile",
            "torch_compile_backend",
            "torch_compile_mode",
            "torch_empty_cache_steps",
            "ray_scope",
            "past_index",
            "mp_parameters",
            "tpu_num_cores",
            "use_legacy_prediction_loop",
            "include_inputs_for_metrics",
            "fsdp_min_num_params",
        ),
        "of no effect here: the machine is looked at instead",
    ),
}
"""Holds anyway, whatever the value: why."""

NOT_DONE: dict[str, tuple[tuple[Any, ...], str]] = {
    "metric_for_best_model": (("eval_loss", "loss"), "the best adapter is that of the smallest evaluation loss"),
    "split_special_tokens": ((True,), "control tokens in contents stay text: see tokenization.allow_special_tokens"),
    "tool_format": ((), "the chat template writes tools in its own way"),
    "push_to_hub": ((False,), "nothing is uploaded"),
    "export_hub_model_id": ((), "nothing is uploaded"),
    "use_swanlab": ((False,), "the curves go to MLflow"),
    **dict.fromkeys(
        (
            "swanlab_project",
            "swanlab_workspace",
            "swanlab_run_name",
            "swanlab_mode",
            "swanlab_api_key",
            "swanlab_logdir",
            "swanlab_lark_webhook_url",
            "swanlab_lark_secret",
        ),
        ((), "the curves go to MLflow"),
    ),
    **dict.fromkeys(
        (
            "hub_model_id",
            "hub_token",
            "hub_strategy",
            "hub_private_repo",
            "push_to_hub_token",
            "push_to_hub_model_id",
            "push_to_hub_organization",
        ),
        ((), "nothing is uploaded"),
    ),
    "top_p": ((1.0,), "only the temperature is set in a chat"),
    "top_k": ((0,), "only the temperature is set in a chat"),
    "repetition_penalty": ((1.0,), "only the temperature is set in a chat"),
}
"""Not done unless the value is one of these, with the same training all the same: why."""

REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "adapter_name_or_path": (
        (),
        "a training begins with the base model: merge the adapter first, and train the result",
    ),
    "create_new_adapter": ((False,), "a training begins with the base model"),
    **dict.fromkeys(
        ("resize_vocab", "add_tokens", "add_special_tokens", "new_special_tokens_config"),
        ((False, ""), "no token is added to a vocabulary"),
    ),
    "rope_scaling": (("none", ""), "the model's own positions are used"),
    **dict.fromkeys(
        (
            "pissa_init",
            "pissa_convert",
            "use_dft_loss",
            "use_asft_loss",
            "use_eaft_loss",
            "use_galore",
            "use_apollo",
            "use_badam",
            "use_adam_mini",
            "use_muon",
            "use_mca",
            "use_llama_pro",
            "shift_attn",
            "fp8",
            "use_hyper_parallel",
        ),
        ((False,), "there is no such method here"),
    ),
    **dict.fromkeys(
        (
            "loraplus_lr_ratio",
            "neftune_noise_alpha",
            "label_smoothing_factor",
            "mixture_of_depths",
        ),
        ((0, 0.0), "there is no such method here"),
    ),
    "pure_bf16": ((False,), "what is trained and AdamW's moments are kept in fp32"),
    "streaming": ((False,), "datasets are read whole, with little memory"),
    "mix_strategy": (("concat",), "write weights of data.mixture into a config of ours"),
    "interleave_probs": ((), "write weights of data.mixture into a config of ours"),
    "tokenized_path": ((), "tokens of another program are not read: name the dataset"),
    "default_system": (("",), "write the system message into the rows"),
    "disable_shuffling": ((False,), "the order is drawn by the seed"),
    "optim_args": ((), "AdamW has its usual constants"),
    "adam_beta1": ((0.9,), "AdamW has its usual constants"),
    "adam_beta2": ((0.999,), "AdamW has its usual constants"),
    "adam_epsilon": ((1e-8,), "AdamW has its usual constants"),
    "lr_scheduler_kwargs": ((), "schedules have no settings of their own"),
    "quantization_method": (("bnb", "bitsandbytes", "BNB"), "4 bits are NF4 by bitsandbytes here"),
    "quantization_type": (("nf4",), "4 bits are NF4 here"),
    "quantization_device_map": ((), "each process has one GPU"),
    "export_quantization_bit": ((), "merge first, then quantize the merged model with its own tool"),
    "export_quantization_dataset": ((), "merge first, then quantize the merged model with its own tool"),
    **dict.fromkeys(
        ("export_quantization_nsamples", "export_quantization_maxlen"),
        ((), "merge first, then quantize the merged model with its own tool"),
    ),
    **dict.fromkeys(
        ("no_cuda", "use_cpu", "use_mps_device"), ((False,), "hide the GPUs with an empty CUDA_VISIBLE_DEVICES instead")
    ),
    **dict.fromkeys(
        ("per_gpu_train_batch_size", "per_gpu_eval_batch_size"), ((), "write per_device_train_batch_size, its new name")
    ),
    "adafactor": ((False,), "AdamW is the optimizer here"),
    "optim_target_modules": ((), "AdamW moves all that is trained"),
    "use_ray": ((False,), "processes are started by this program"),
}
"""Refused unless the value is one of these: why."""
