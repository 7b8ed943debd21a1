"""What a KV cache costs a model: ``vllm-xlayer quality``, and the global scales that it can choose.

`command` starts an engine a cache (`engine`), each in a process of its own. An engine reads windows of text
as decode and as chunked prefill do (`forcing`), and saves what the model thought of every token. `measures`
compare that, `statistics` are of K and V themselves (`hooks` see them), and `report` and `plot` show it.
"""
