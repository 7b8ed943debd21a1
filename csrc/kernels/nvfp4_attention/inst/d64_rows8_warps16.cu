#include "../variant_impl.cuh"

template xlayer::attention::Variant xlayer::attention::variant<xlayer::attention::Config<64, 1, 16>>();
