#!/bin/sh
# serve.sh MODEL [FLAG...]: an OpenAI-compatible server with an NVFP4 KV cache; prompts are kept in host memory.
set -eu
model=$1
shift
exec vllm serve "$model" --kv-cache-dtype nvfp4 --kv-connector XLayerConnector \
  --enable-prompt-tokens-details "$@"
