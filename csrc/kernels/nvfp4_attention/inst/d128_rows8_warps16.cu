#include "../variant_impl.cuh"

template xlayer::attention::Variant xlayer::attention::variant<xlayer::attention::Config<128, 1, 16>>();
