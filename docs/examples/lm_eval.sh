#!/bin/sh
# lm_eval.sh MODEL [FLAG...]: a task with this package's cache. Needs: pip install "vllm-xlayer[eval]"
set -eu
model=$1
shift
exec lm_eval --model vllm --tasks xlayer_recall --include_path "$(python -m vllm_xlayer.demo.tasks)" \
  --model_args "{\"pretrained\": \"$model\", \"kv_cache_dtype\": \"nvfp4\",
    \"kv_transfer_config\": {\"kv_connector\": \"XLayerConnector\", \"kv_role\": \"kv_both\"}}" "$@"
