mod outages;
mod shared;
