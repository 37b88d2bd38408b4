"""Pipeline parallelism on DeepSpeed's PipelineModule and PipelineEngine."""
