mod keys;
mod outages;
mod shared;
mod watches;
