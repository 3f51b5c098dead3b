"""Small files of a composite checkpoint that text alone does not need, and that come back with the merged model."""

PROCESSOR_FILES = (
    "preprocessor_config.json",
    "processor_config.json",
    "image_processor_config.json",
    "video_preprocessor_config.json",
    "feature_extractor_config.json",
)

TRAINED_CONFIG, TRAINED_WEIGHTS = "trained_config.json", "trained_weights.safetensors"
"""Of a training without an adapter: what says so, and the weights."""
