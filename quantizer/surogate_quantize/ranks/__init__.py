"""Many processes that make one artifact: started by torchrun, on one machine or several that share a file system."""
