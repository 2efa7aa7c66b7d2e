"""Read and check the files of an adapter as PEFT saves it."""
