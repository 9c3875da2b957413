// K and V in the rotated cache types for upstream's attention, which asks for four values of a block at a time

layout (binding = 1) readonly buffer K_RQ { uint16_t data[]; } k_rq;
layout (binding = 2) readonly buffer V_RQ { uint16_t data[]; } v_rq;

#define FA_RQ_VALUES(BUF, TYPE) {                                                                           \
    vec4 values;                                                                                            \
    RQ_DEQUANTIZE4(values, BUF.data, a_offset + ib, iqs, rq_type_bits(TYPE), rq_type_block(TYPE))           \
    return FLOAT_TYPEV4(values);                                                                            \
}

// at the entry of dequantize4
#define FA_RQ_DEQUANTIZE4                                   \
    if (binding_idx == BINDING_IDX_K) {                     \
        if (rq_is_type(FaTypeK)) FA_RQ_VALUES(k_rq, FaTypeK) \
    } else {                                                \
        if (rq_is_type(FaTypeV)) FA_RQ_VALUES(v_rq, FaTypeV) \
    }
