"""What LLaMA-Factory's keys are known as, and values that no key may have."""

from pathlib import Path
from typing import Any

import pytest

from schemas.llamafactory.keys import IMPLIED, NOT_DONE, REFUSED
from schemas.llamafactory.lines import NOT_GIVEN, to_number, to_whole
from schemas.llamafactory.settings import LORA, SETTINGS
from schemas.llamafactory.training import FREEZE
from schemas.llamafactory.translation import translate


def test_no_key_is_in_two_tables() -> None:
    tables = [set(SETTINGS), set(LORA), set(FREEZE), set(IMPLIED), set(NOT_DONE), set(REFUSED)]
    assert len(set.union(*tables)) == sum(map(len, tables))
    assert NOT_GIVEN not in set.union(*tables)


# Every key that its documentation, or the examples for LoRA, full training, export and chat, name.
_DOCUMENTED = """
model_name_or_path adapter_name_or_path adapter_folder cache_dir use_fast_tokenizer resize_vocab
split_special_tokens add_tokens add_special_tokens new_special_tokens_config init_special_tokens model_revision
low_cpu_mem_usage rope_scaling flash_attn enable_liger_kernel use_unsloth use_unsloth_gc
disable_gradient_checkpointing use_reentrant_gc upcast_layernorm upcast_lmhead_output infer_backend infer_dtype
trust_remote_code hf_hub_token print_param_status quantization_method quantization_bit quantization_type
double_quantization quantization_device_map stage do_train do_eval do_predict finetuning_type lora_rank lora_alpha
lora_dropout lora_target additional_target loraplus_lr_ratio loraplus_lr_embedding use_rslora use_dora pissa_init
pissa_iter pissa_convert create_new_adapter pure_bf16 use_dft_loss use_asft_loss use_eaft_loss compute_accuracy
disable_shuffling early_stopping_steps plot_loss include_effective_tokens_per_second freeze_trainable_layers
freeze_trainable_modules freeze_extra_modules freeze_vision_tower use_swanlab swanlab_project swanlab_run_name
swanlab_mode swanlab_api_key template dataset eval_dataset dataset_dir media_dir cutoff_len train_on_prompt
mask_history streaming buffer_size mix_strategy interleave_probs overwrite_cache preprocessing_batch_size
preprocessing_num_workers max_samples eval_num_beams ignore_pad_token_for_loss val_size eval_on_each_dataset packing
neat_packing tool_format default_system enable_thinking preserve_thinking tokenized_path data_shared_file_system
output_dir overwrite_output_dir logging_steps save_steps save_total_limit save_only_model report_to
per_device_train_batch_size gradient_accumulation_steps learning_rate num_train_epochs max_steps lr_scheduler_type
warmup_ratio warmup_steps weight_decay max_grad_norm optim bf16 fp16 seed data_seed ddp_timeout deepspeed
dataloader_num_workers eval_strategy evaluation_strategy eval_steps per_device_eval_batch_size
load_best_model_at_end metric_for_best_model resume_from_checkpoint run_name neftune_noise_alpha logging_dir
save_safetensors group_by_length include_tokens_per_second no_cuda half_precision_backend fp16_backend
fp16_opt_level adafactor per_gpu_train_batch_size per_gpu_eval_batch_size include_inputs_for_metrics
push_to_hub_token push_to_hub_model_id push_to_hub_organization use_ipex jit_mode_eval torchdynamo ray_scope
past_index mp_parameters tpu_num_cores use_mps_device use_legacy_prediction_loop fsdp_min_num_params
predict_with_generate do_sample temperature top_p top_k num_beams max_length max_new_tokens repetition_penalty
length_penalty skip_special_tokens export_dir export_size export_device export_quantization_bit
export_quantization_dataset export_quantization_nsamples export_quantization_maxlen export_legacy_format
export_hub_model_id save_strategy logging_first_step use_cpu torch_compile push_to_hub hub_model_id
torch_empty_cache_steps optim_target_modules
"""


@pytest.mark.parametrize("key", _DOCUMENTED.split())
def test_every_documented_key_is_known(key: str) -> None:
    given: dict[str, Any] = {"model_name_or_path": "m", "dataset": "a", "do_train": True}
    if key.startswith("export_"):
        given = {"model_name_or_path": "m", "adapter_name_or_path": "a", "export_dir": "d"}
    lines = [line for line in translate({**given, key: "d" if key == "export_dir" else 1}).lines if line.key == key]
    assert lines
    assert not [line for line in lines if "no such key" in line.text]


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 10**4000, 1.5, True])
def test_no_whole_number_is_a_type_or_value_error(value: object) -> None:
    with pytest.raises((TypeError, ValueError)):
        to_whole(value)
    assert to_whole("16") == 16


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 10**4000, True])
def test_no_finite_number_is_a_type_or_value_error(value: object) -> None:
    with pytest.raises((TypeError, ValueError)):
        to_number(value)
    assert to_number("0.5") == 0.5


@pytest.mark.parametrize("name", ["a" * 5000, "~nobody-of-this-name/data"])
def test_a_folder_that_cannot_be_is_not_there(tmp_path: Path, name: str) -> None:
    given = {"model_name_or_path": "m", "stage": "sft", "do_train": True, "dataset": "d", "dataset_dir": name}
    (line,) = [line for line in translate(given, folder=tmp_path).lines if line.key == "dataset_dir"]
    assert line.outcome == "refused"
    assert "no such file" in line.text
