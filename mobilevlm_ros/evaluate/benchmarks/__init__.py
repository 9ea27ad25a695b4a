"""The benchmarks of the MobileVLM paper: their files read, their prompts asked, their rules of scoring kept."""
