"""The smallest training of a Transfusion: its model, and the fields of its recipe."""

MICRO_MODEL = {
    "model_type": "transfusion",
    "text_config": {
        "model_type": "llama",
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 44,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 160,
    },
    "image_size": 16,
    "patch_size": 4,
    "prediction_type": "flow_prediction",
    "timestep_sampling": "logit_normal",
    "num_inference_steps": 2,
    "boi_token_id": 3,
    "eoi_token_id": 4,
    "image_token_id": 5,
}
MICRO_RUN = {
    "num_scenes": 23,
    "vocab_size": 300,
    "max_steps": 2,
    "per_device_train_batch_size": 4,
    "learning_rate": 0.01,
    "logging_steps": 1,
    "mixed_precision": "no",
    "report_to": "none",
    "num_samples": 2,
}
