"""What the help of each command of `hf-mm` shows below its options."""

GENERATE_EXAMPLES = """\b
Examples:
  hf-mm generate "a red star on a white background" --output star.png
  hf-mm generate "a red star" "a blue heart" --num-images 4 --seed 7 --output pictures/shape.png
  hf-mm generate "a red star" --model me/my-transfusion --guidance-scale 3 --num-inference-steps 50
  hf-mm generate "a red star" --model me/my-cm3leon --retrieval-dir runs/retrieval --num-retrieved 2 --json
"""
CAPTION_EXAMPLES = """\b
Examples:
  hf-mm caption star.png
  hf-mm caption pictures/*.jpg --json
  hf-mm caption star.png --model me/my-transfusion --prompt "a picture of"
"""
EDIT_EXAMPLES = """\b
Examples:
  hf-mm edit star.png "make the star blue" --output blue.png
  hf-mm edit star.png "put it on a yellow background" --guidance-scale 3 --image-guidance-scale 1.5 --seed 7
  hf-mm edit edges.png "Make high quality image from canny edge features<image>a red star" --model me/my-cm3leon
"""
CHAT_EXAMPLES = """\b
Examples:
  hf-mm chat --model me/my-transfusion-sft
  hf-mm chat --image star.png --output-dir pictures
  printf '/image star.png\\nwhat is it?\\nmake it blue\\n' | hf-mm chat --json
"""
INFO_EXAMPLES = """\b
Examples:
  hf-mm info
  hf-mm info me/my-transfusion
  hf-mm info runs/cm3leon_tiny_sft --json
  hf-mm info recipes/configs/transfusion_7b_pretrain.yaml --plan --num-gpus 256 --token-budget 2e12
  hf-mm info recipes/configs/models/cm3leon_760m.json --plan --micro-batch-size 4 --gradient-checkpointing --json
"""
TRAIN_EXAMPLES = """\b
Examples:
  hf-mm train recipes/configs/transfusion_tiny_pretrain.yaml
  hf-mm train recipes/configs/transfusion_tiny_sft.yaml -- --learning_rate 1e-4 --output_dir runs/mine
  hf-mm train recipes/configs/cm3leon_7b_pretrain.yaml --accelerate-config my_cluster.yaml --dry-run
"""
DEMO_EXAMPLES = """\b
Examples:
  hf-mm demo
  hf-mm demo --model me/my-transfusion-sft --port 7861 --example "a red fox" --example "a blue boat"
  hf-mm demo --model me/my-cm3leon --retrieval-dir runs/retrieval
  hf-mm demo --model me/my-transfusion-sft --space-dir my-space
"""
